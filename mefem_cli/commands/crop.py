"""Photos -> 224 px face crops + a manifest."""

OPTIONS = ("console:ConsoleOptions",)
ARGUMENT = ("sources", "Folders (recursive), files or quoted globs; - reads one path a line from stdin.")


def run(arguments, given):
    print(arguments, given)
