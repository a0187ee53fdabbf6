"""Where A and B come from: a method is one file here, with a frozen dataclass, and one row of `recipe.NAMED`."""
