"""`glm4v chat`: a conversation in the terminal.

- `chat`: the command: reads lines from a person or a pipe.
- `session`: the conversation with its options and attachments; asks, and shows the answer.
- `commands`: the table of commands that begin with a slash.
- `attachments`: images and videos for the next message.
- `transcript`: conversations as files.
"""
