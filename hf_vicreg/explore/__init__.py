"""A folder of images as a local web page: `hf-vicreg explore`."""
