"""`pgolf recipes`: what recipes there are, and where each of their values comes from."""

from pgolf.options import Parser
from pgolf.recipes import show


def main(argv: list[str]) -> int:
    """Print a list, a recipe or all keys."""
    parser = Parser(
        prog="pgolf recipes", description="List recipes, show one with the source of every value."
    )
    parser.add_argument("recipe", nargs="?", help="show this one")
    parser.add_argument("--keys", action="store_true", help="list every key with its default")
    args = parser.parse_args(argv)
    if args.keys:
        print(show.list_keys())
    else:
        print(show.show_recipe(args.recipe) if args.recipe else show.list_recipes())
    return 0
