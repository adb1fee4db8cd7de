"""What --help shows: the groups, the composed config and the flags. Light, as cli.py is.

Hydra's own help loads and copies each file of each group twice, which took 0.3 seconds."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

FLAGS = """\
  --cfg job            print the composed config and stop; --resolve fills in its references
  -m, --multirun       sweep: each key=A,B,... makes a job for each value
  --config-dir DIR     a folder of your own groups and files, beside conf/
  --info, --hydra-help what Hydra itself has to say"""


def text(conf: Path, name: str, config: DictConfig) -> str:
    """The help of the command `name`, whose config `conf/<name>.yaml` was composed to `config`."""
    first = (conf / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ")
    defaults = OmegaConf.load(conf / f"{name}.yaml").defaults
    used = sorted(str(key) for entry in defaults if isinstance(entry, DictConfig) for key in entry)
    groups = [f"  {group:11} {', '.join(options(conf / group))}" for group in used if group not in ("hydra", "paths")]
    parts = [first]
    if not groups:
        own = (conf / f"{name}.yaml").read_text().partition("\n\n")[2].partition("hydra:\n")[0].splitlines()
        keys = [line for line in own if "# filled in" not in line and not line.startswith("task:")]
        return f"{first}\n\nConfig: override anything with key=value\n\n" + "\n".join(keys)
    parts.append("Groups: choose with group=option\n" + "\n".join(groups))
    parts.append("Flags\n" + FLAGS)
    parts.append(
        "Config: override anything with key=value, add with +key=value; conf/ explains each key\n\n"
        + OmegaConf.to_yaml(config).rstrip()
    )
    return "\n\n".join(parts)


def options(group: Path) -> list[str]:
    """The options of a group: its files' names."""
    return sorted(path.stem for path in group.glob("[!_]*.yaml"))  # _base.yaml is what the options extend
