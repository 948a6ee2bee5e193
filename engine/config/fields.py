"""What a documented field of a configuration is, and the bounds that it keeps."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from gearshift.engine.config.errors import ConfigError


def knob(default: Any = MISSING, text: str = "", *, above=None, least=None, most=None) -> Any:
    """A documented field; `above` is an exclusive lower bound, `least` and `most` are inclusive."""
    bounds = {"text": text, "above": above, "least": least, "most": most}
    if isinstance(default, (list, tuple, dict)) and not default:
        return field(default_factory=type(default), metadata=bounds)
    return field(default=default, metadata=bounds)


def section(kind: type, text: str) -> Any:
    """A nested dataclass with its own defaults."""
    return field(default_factory=kind, metadata={"text": text})


def check_bounds(config: Any) -> None:
    """Raises ConfigError naming the first field of `config` outside its bounds."""
    for entry in fields(config):
        value, rule = getattr(config, entry.name), entry.metadata
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if rule.get("above") is not None and not value > rule["above"]:
            raise ConfigError(entry.name, f"must be above {rule['above']}", value=value)
        if rule.get("least") is not None and not value >= rule["least"]:
            raise ConfigError(entry.name, f"must be at least {rule['least']}", value=value)
        if rule.get("most") is not None and not value <= rule["most"]:
            raise ConfigError(entry.name, f"must be at most {rule['most']}", value=value)


@dataclass(frozen=True, kw_only=True)
class Bounded:
    """Checks every field's own bounds when an instance is made."""

    def __post_init__(self):
        check_bounds(self)
