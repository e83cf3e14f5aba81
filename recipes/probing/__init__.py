"""Parts of the linear probe recipe: the methods that fit a head, the report and the plot."""
