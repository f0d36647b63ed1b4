"""Everything ddfup raises on purpose: messages with file or argument, rule and value; hints."""

from __future__ import annotations


class DDFUpError(Exception):
    """Base of all errors meant for users.

    Attributes:
        message: What is wrong, with the file or argument, the rule and the value.
        hint: What to do about it; may be empty.
        exit_code: Exit status the command line ends with.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ArgumentError(DDFUpError, ValueError):
    """An argument or option breaks a rule."""

    exit_code = 2


class InputError(DDFUpError):
    """An input file or array cannot be used."""

    exit_code = 4


class PairingError(DDFUpError):
    """Files do not pair, or in more than one way."""

    exit_code = 5


class OutputError(DDFUpError):
    """An output cannot be written, or would replace a file without leave."""

    exit_code = 6


class WeightsError(DDFUpError):
    """Weights are missing, damaged or of another architecture."""

    exit_code = 7

    def __init__(self, message: str, hint: str = "`ddfup models` lists and verifies the weights there are") -> None:
        super().__init__(message, hint)


class DeviceError(DDFUpError):
    """The requested device is absent, or out of memory."""

    exit_code = 8


class KernelBuildError(DDFUpError):
    """The native kernels could not be built although DDFUP_KERNELS=native asks for them."""

    exit_code = 1


class ExportError(DDFUpError):
    """A network cannot be exported, or what was exported is not the network."""

    exit_code = 1
