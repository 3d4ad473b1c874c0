"""Libraries of optional features, imported where they are needed."""

from types import ModuleType

from pgolf.errors import ConfigError


def safetensors() -> ModuleType:
    """safetensors.torch, of the format's own library.

    Raises:
        ConfigError: it is not installed; the message says how to.
    """
    try:
        import safetensors.torch as library
    except ImportError as e:
        raise ConfigError(
            "safetensors files need the library safetensors: pip install 'pgolf[export]'"
        ) from e
    return library
