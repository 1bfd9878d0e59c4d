"""The version, apart from the package that shows it: modules below it may say it too."""

__version__ = "0.1.0"
