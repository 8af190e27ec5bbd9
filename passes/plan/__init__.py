"""In: located sites and a recipe. Out: a frozen `Plan`, or an error that names the rule."""
