"""What can be wrong with a data set, in one line that names the file and says what to do."""


class DataError(ValueError):
    """The data or the arguments that select them cannot be used."""


class DataUnavailable(DataError):  # noqa: N818 (it is one of the DataErrors)
    """No file of the data set is there, and it cannot be downloaded."""
