"""cofitune: teach a large language model a speciality without making it forget (CoFiTune, arXiv 2404.10306)."""

__version__ = "0.1.0"
