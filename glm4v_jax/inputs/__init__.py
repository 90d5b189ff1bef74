"""The host side: text, images and videos into arrays of static shape; imports no JAX."""
