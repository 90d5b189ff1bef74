"""The reference's names and call shapes, over the other rooms."""
