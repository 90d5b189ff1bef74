"""`glm4v chat`: a conversation in the terminal."""
