"""Parts of the recipe without pretraining: the scattering transform, and its private standardisation."""
