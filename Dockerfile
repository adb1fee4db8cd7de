# docker build --tag alexlab . && docker run --rm --gpus all --shm-size 8g --volume DATA:/data:ro --volume "$PWD/logs:/project/logs" alexlab data=folder data.root=/data
# Checked by a linter only: it was not built yet.
FROM python:3.13-slim-trixie

# g++ is for torch.compile
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git=1:2.* make=4.* g++=4:14.* \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /project
COPY pyproject.toml requirements.lock Makefile README.md ./
COPY src src
RUN make setup
COPY . .

ENTRYPOINT [".venv/bin/python", "train.py"]
