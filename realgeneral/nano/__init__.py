"""What ships: the small model's files, emoji, avatars, and what the word "nano" means.

In reading order:

assets   the files, and the name "nano" where a checkpoint or adapter is asked for
emoji    concepts in three styles
avatars  characters in six states
colours  the colours of a picture in words
"""
