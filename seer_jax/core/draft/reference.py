"""What the suffix automaton answers, by looking through all texts: slow, obvious, and what tests trust."""

from collections import Counter

from seer_jax.core.draft.speculate import SpeculationArgs


class ReferenceIndex:
    """The texts of one group as a tree: a node is an appended token, so a shared prompt is there once.

    Args:
        max_context: Longest context that is looked up.
    """

    def __init__(self, max_context: int) -> None:
        self.max_context = max_context
        self._parents: list[int] = [-1]
        self._tokens: list[int] = [-1]
        self._ends: dict[int, int] = {}

    def open(self, request: int, like: int | None = None) -> None:
        """Start a request, with the tokens of another one if `like` is given."""
        self._ends[request] = 0 if like is None else self._ends[like]

    def append(self, request: int, token_ids: list[int]) -> None:
        """Append tokens."""
        for token in token_ids:
            self._parents.append(self._ends[request])
            self._tokens.append(token)
            self._ends[request] = len(self._tokens) - 1

    def last_tokens(self, node: int, count: int) -> tuple[int, ...]:
        """The `count` tokens that end at a node; fewer near the beginning of the text."""
        tokens: list[int] = []
        while node > 0 and len(tokens) < count:
            tokens.append(self._tokens[node])
            node = self._parents[node]
        return tuple(reversed(tokens))

    def count(self, context: tuple[int, ...]) -> int:
        """How often a context occurs."""
        return sum(self.last_tokens(node, len(context)) == context for node in range(1, len(self._tokens)))

    def continuations(self, context: tuple[int, ...]) -> Counter[int]:
        """The tokens that followed a context, with how often each did."""
        return Counter(
            self._tokens[node]
            for node in range(1, len(self._tokens))
            if self.last_tokens(self._parents[node], len(context)) == context
        )

    def longest_match(self, context: tuple[int, ...]) -> tuple[int, ...]:
        """The longest suffix of a context that something followed, shorter than `max_context`; () if there is none."""
        for length in range(min(len(context), self.max_context - 1), 0, -1):
            if self.continuations(context[-length:]):
                return context[-length:]
        return ()

    def draft_line(self, request: int, args: SpeculationArgs) -> list[set[int]]:
        """Tokens that a draft of one line may have at each depth: the likeliest, several if they tie.

        Follows the first of the tied, so it stops at the first tie.
        """
        context = self.longest_match(self.last_tokens(self._ends[request], self.max_context))
        line: list[set[int]] = []
        if len(context) < args.pattern_lookup_min:
            return line
        depth = min(args.max_spec_tokens, int(args.max_depth_per_match * len(context)))
        while len(line) < depth and len(context) >= args.pattern_lookup_min:
            followers = self.continuations(context)
            most = max(followers.values())
            best = {token for token, count in followers.items() if count == most}
            line.append(best)
            if len(best) > 1:
                break
            context = self.longest_match((*context, *best))
        return line
