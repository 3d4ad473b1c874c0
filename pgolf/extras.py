"""Libraries that are imported where they are needed."""

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


def python_minifier() -> ModuleType:
    """python_minifier, which a submission's code goes through before its bytes are counted.

    Raises:
        ConfigError: it is not installed; the message says how to.
    """
    try:
        import python_minifier as library
    except ImportError as e:
        raise ConfigError(
            "a run's code is counted as python-minifier leaves it: pip install python-minifier"
        ) from e
    return library


def matplotlib() -> ModuleType:
    """matplotlib, which takes a second to load.

    Raises:
        ConfigError: it is not installed or does not load; the message says how to mend that.
    """
    try:
        import matplotlib as library
        import matplotlib.figure
    except Exception as e:  # also of its own libraries, and of a backend that MPLBACKEND invents
        raise ConfigError(
            f"figures need the library matplotlib, which does not load ({e}): "
            "pip install --upgrade matplotlib"
        ) from e
    return library
