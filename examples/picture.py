"""The command line of the examples: where the picture goes."""

import argparse
import pathlib


def output(doc: str, file: str) -> pathlib.Path:
    """The path of the picture: beside the example, unless `--output` says where.

    Args:
      doc: what the example shows, its docstring.
      file: the example.
    """

    def picture(text: str) -> pathlib.Path:
        path = pathlib.Path(text).expanduser()
        if not path.parent.is_dir() or path.is_dir() or path.suffix not in (".png", ".pdf", ".svg", ".jpg"):
            raise argparse.ArgumentTypeError(f"{text!r} is no .png, .pdf, .svg or .jpg in a directory that is there")
        return path

    module = f"python -m examples.{pathlib.Path(file).stem}"
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=module, description=doc, formatter_class=raw, allow_abbrev=False)
    default = pathlib.Path(file).with_suffix(".png")
    parser.add_argument("--output", type=picture, default=default, help="the picture; %(default)s unless told")
    return parser.parse_args().output
