"""Sets of the Hugging Face hub, Parquet files and image folders, by `datasets`. A class by index, see items.py."""

from pathlib import Path
from typing import Any

from alexlab.data.folder import SPELLINGS, listed
from alexlab.engine.errors import UserError


class HuggingFaceSet:
    """One split. The arguments are keys of conf/data/huggingface.yaml.

    From version 4 on, `datasets` runs no code of a set.

    Raises:
        KeyError: the set has no such split.
        UserError: the extra is not installed; or the set, or a column, does not exist.
    """

    val_fraction = 0.1  # of the training images, if the set has no val images and data.val_fraction is null

    def __init__(
        self, path: str, split: str, subset: str | None = None, columns: Any = None, download: bool = True
    ) -> None:
        try:
            import datasets
            import huggingface_hub
        except ImportError:
            raise UserError("data=huggingface needs the extra: pip install 'alexlab[huggingface]'.") from None
        if not download:
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        try:
            local = Path(path).expanduser()
            parts = datasets.load_dataset(str(local) if local.exists() else path, subset)
        except Exception as error:  # of the hub, the network or pyarrow
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(f"data.path={path} cannot be loaded ({type(error).__name__}: {reason}).") from None
        found = next((name for name in parts if SPELLINGS.get(str(name).lower()) == split), None)
        if found is None:
            raise KeyError(split)
        features, chosen = parts[found].features, {}
        for key, kind in (("image", datasets.Image), ("label", datasets.ClassLabel)):
            of_kind = (name for name, feature in features.items() if isinstance(feature, kind))
            chosen[key] = (columns or {}).get(key) or next(of_kind, key)
            if chosen[key] not in features:
                raise UserError(
                    f"data.path={path} has no column {chosen[key]}, but {listed(list(features))}: name one with "
                    f"data.columns.{key}=NAME."
                )
        self.image, label = chosen["image"], chosen["label"]
        self.images = parts[found].cast_column(self.image, datasets.Image(decode=False))
        self.targets, kind = parts[found][label][:], features[label]
        several = getattr(kind, "feature", None)  # of a list of classes per image
        self.classes = getattr(several or kind, "names", None)
        if several is not None:
            self.targets = list(map(set, self.targets))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        content = self.images[i][self.image]
        return content["bytes"] or content["path"], self.targets[i]
