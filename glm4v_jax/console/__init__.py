"""What all commands share: options, progress, tables, errors as one line."""
