"""Every error a user can meet, and the exit code each one leaves with.

EdgeloraError          3  the operation failed
├── UsageError         2  the command line or the recipe is wrong
│   └── RecipeError    2  every problem of a recipe, in one message
├── CheckFailed        1  a budget or a comparison was not met
├── DataError          3  a data file cannot be read or holds nothing to train on
├── ModelError         3  a base model, adapter or exported file is missing, damaged or of an unknown kind
├── VerifyError        3  an exported file differs from the model that was trained
├── ToolMissing        3  a package, compiler or program that this step needs is absent
├── DiskFull           3  the file system ran out of space
├── DeviceError        3  a device is out of reach, or a program on it failed
└── Unsupported        3  this runtime or format cannot do what was asked
"""


class EdgeloraError(Exception):
    """One line that says what is wrong (with the offending value) and one that says what to do."""

    exit_code = 3

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EdgeloraError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class CheckFailed(EdgeloraError):
    exit_code = 1


class DataError(EdgeloraError):
    pass


class ModelError(EdgeloraError):
    pass


class VerifyError(EdgeloraError):
    pass


class ToolMissing(EdgeloraError):
    pass


class DiskFull(EdgeloraError):
    pass


class DeviceError(EdgeloraError):
    pass


class Unsupported(EdgeloraError):
    pass
