"""The methods: a file each, with a frozen dataclass of settings, and a row of `recipe.NAMED`."""
