from cofitune.callable_module import make_callable

make_callable(__name__)
