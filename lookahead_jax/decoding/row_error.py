"""An error that concerns one row of a batch."""


class RowError(Exception):
    """A host drafter or a grammar failed for one row; no row has made a step."""

    def __init__(self, row: int, error: Exception):
        super().__init__(f"row {row}: {type(error).__name__}: {error}")
        self.row = row
        self.error = error
