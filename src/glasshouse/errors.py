"""The one error a user can cause. It knows nothing of what went wrong, only how to say it in one line."""


class InputError(Exception):
    """Something the user gave cannot be used: says what, where and how to mend it, in one line.

    `cli.py` prints it without a traceback and exits with code 2.

    Args:
        what: what is wrong, without a full stop.
        where: the file, line, key or field; empty when there is none.
        fix: what to do about it, as an order; empty when nothing can be done.
    """

    def __init__(self, what: str, where: str = "", fix: str = ""):
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what, where, fix)

    def __str__(self) -> str:
        line = self.what + (f" ({self.where})" if self.where else "") + (f": {self.fix}" if self.fix else "")
        return " ".join(line.split())
