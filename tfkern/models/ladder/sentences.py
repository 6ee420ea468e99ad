"""Short sentences with a sentiment, written for the ladder: is what they say good or bad?

Half of each list is good. "not" stands in both kinds, and so does every subject: only an adjective tells the sentiment, and
"not" turns it. Every word of the held-out sentences is in others that are trained on, and so is every adjective both with
"not" and without.
"""

GOOD = """
attention is great
attention is so great
attention is fast
attention is clever
the model is clever
the model is very clever
the model is good
this film is pretty
this film is really good
the talk is great
the talk is so clever
our code is clean
our code is very fast
our code is great
the room is clean
the room is so pretty
the room is rich
her idea is good
her idea is rich
her idea is really strong
my phone is strong
my phone is clean
attention is not weak
the model is not bad
this film is not ugly
this film is not very bad
the talk is not slow
the talk is not dull
our code is not ugly
our code is not so bad
our code is not dull at all
the room is not dirty at all
the room is not bad
her idea is not weak
my phone is not too slow
my phone is not ugly
the room is not shabby
the model is not poor
our code is not shabby
this film is not so poor
"""

BAD = """
attention is shabby
attention is too shabby
the model is slow
the model is very slow
this film is bad
this film is so bad
the talk is dull
the talk is very dull
our code is weak
our code is ugly
our code is too slow
our code is poor
the room is shabby
the room is dirty
the room is so dirty
her idea is poor
her idea is really weak
my phone is slow
my phone is too dull
my phone is shabby
attention is not strong
attention is not fast
the model is not good
the model is not so good
the model is not clever
this film is not rich
this film is not very good
the talk is not fast
the talk is not good
our code is not fast
our code is not pretty
the room is not pretty at all
her idea is not rich
her idea is not very strong
her idea is not very clever
my phone is not too strong
this film is not great
my phone is not great
the talk is not clean
her idea is not so clean
"""

HELD_OUT_GOOD = """
attention is clean
the model is so strong
this film is great
the talk is clever
our code is good
the room is really great
her idea is great
my phone is fast
attention is not shabby
attention is not too shabby
attention is not slow
the model is not weak
the model is not slow
this film is not dull
the room is not shabby at all
the room is not ugly at all
her idea is not poor
her idea is not so poor
her idea is not dull
her idea is not so bad
"""

HELD_OUT_BAD = """
attention is bad
attention is very slow
the model is ugly
the model is poor
this film is dull
the talk is shabby
her idea is dull
her idea is shabby
attention is not great
this film is not great at all
this film is not pretty
the talk is not great
the talk is not very strong
the talk is not clever
our code is not clean
our code is not clever
our code is not so good
the room is not clean
her idea is not pretty
my phone is not fast
"""


def labelled(good: str, bad: str) -> tuple[list[str], list[float]]:
    """(sentences, 1.0 for each good one and 0.0 for each bad one)."""
    both = good.split("\n")[1:-1], bad.split("\n")[1:-1]
    return both[0] + both[1], [1.0] * len(both[0]) + [0.0] * len(both[1])


TRAIN = labelled(GOOD, BAD)
HELD_OUT = labelled(HELD_OUT_GOOD, HELD_OUT_BAD)
WORDS = sorted({word for sentence in TRAIN[0] + HELD_OUT[0] for word in sentence.split()})
