"""The subcommands of `glm4v`, one module each."""
