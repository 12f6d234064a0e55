"""The errors that this project raises for bad input: path, what was expected, what came, what to do."""


class MokaError(ValueError):
    """Bad input. The message is complete: the command line prints it alone, without a traceback."""


class ConfigError(MokaError):
    """A setting is unknown, out of range, or contradicts another."""


class AdapterError(MokaError):
    """An adapter's tensors do not fit its config, its plan or its base model."""


class TargetError(MokaError):
    """The layers that the config names are not in the model, or are no linear layers."""


class DataError(MokaError):
    """Training data cannot be used as it is."""


class ModelError(MokaError):
    """A model folder is missing something, or holds a model that is not supported."""


class PathError(MokaError):
    """A file or folder cannot be written, or stands where one is to be written."""
