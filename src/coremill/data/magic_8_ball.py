"""The Magic 8 Ball: questions in three moods, a teacher over the classic twenty answers, and questions of fact.

Five questions in six are about the future. The opening words determine the mood (hopeful, doubtful or unclear), and
the subject is the topic. The teacher gives 94 % of the probability to the answers of the mood, most of it to those
that the topic favours; the other answers share the rest. One question in six asks for a fact. Its only right answer
is a tool call with the arguments in the question.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from coremill.core.answer_key import Tools
from coremill.data.grammar import ArgumentValues, Grammar, Question, Section, Teacher, tool_section

KIND: Final = "magic-8-ball"

ANSWERS: Mapping[str, tuple[str, ...]] = {
    "hopeful": (
        "It is certain.",
        "It is decidedly so.",
        "Without a doubt.",
        "Yes definitely.",
        "You may rely on it.",
        "As I see it, yes.",
        "Most likely.",
        "Outlook good.",
        "Yes.",
        "Signs point to yes.",
    ),
    "unclear": (
        "Reply hazy, try again.",
        "Ask again later.",
        "Better not tell you now.",
        "Cannot predict now.",
        "Concentrate and ask again.",
    ),
    "doubtful": (
        "Don't count on it.",
        "My reply is no.",
        "My sources say no.",
        "Outlook not so good.",
        "Very doubtful.",
    ),
}
"""The twenty answers of the toy (Mattel's Magic 8 Ball; https://en.wikipedia.org/wiki/Magic_8_Ball), by mood."""

MOOD_OF: Mapping[str, str] = {answer: mood for mood, answers in ANSWERS.items() for answer in answers}

_PARTS = 10_000
_OTHERS = 600
"""The share of the answers of the other two moods together, in parts of `_PARTS`."""

_LEANING: Mapping[str, tuple[int, ...]] = {
    "hopeful": (4400, 1700, 1000, 700, 500, 400, 300, 200, 120, 80),
    "unclear": (5000, 2000, 1200, 700, 500),
    "doubtful": (5000, 2000, 1200, 700, 500),
}
"""Parts of the answers of the mood, from the one that the topic favours most."""

_OPENERS: Mapping[str, tuple[str, ...]] = {
    "hopeful": (
        "I feel lucky:",
        "I am full of hope:",
        "All the signs are bright:",
        "I trust in this:",
        "Fortune smiles on us:",
        "With joy I ask:",
        "My heart is light:",
        "I had a golden dream:",
    ),
    "doubtful": (
        "I fear the worst:",
        "I hardly dare ask:",
        "Against all odds,",
        "Nothing has worked yet:",
        "I have lost all hope:",
        "With a heavy heart I ask:",
        "It looks bleak:",
        "I do not believe it, but",
    ),
    "unclear": (
        "I cannot tell:",
        "Some say yes, some say no:",
        "The mist is thick:",
        "I am of two minds:",
        "Who knows,",
        "It could go either way:",
        "My thoughts are a muddle:",
        "I hardly know what I ask:",
    ),
}

_OWNERS = ("my", "our", "your", "his", "her", "their", "the", "Eva's", "Anna's", "Tom's")

TOPICS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "garden": (
        ("garden", "orchard", "lawn", "vine", "hedge"),
        (
            "bloom",
            "thrive",
            "grow back",
            "bear fruit",
        ),
    ),
    "travel": (
        ("trip", "journey", "voyage", "tour", "cruise"),
        ("begin well", "be booked", "go far", "end well"),
    ),
    "love": (
        ("sweetheart", "crush", "true love", "partner", "admirer"),
        ("write back", "call", "say yes", "come home"),
    ),
    "money": (
        ("savings", "bonus", "loan", "refund", "budget"),
        ("arrive", "double", "hold out", "cover it all"),
    ),
    "sport": (
        ("team", "club", "crew", "coach", "runner"),
        ("win", "score", "reach the final", "take the cup"),
    ),
    "music": (
        ("band", "choir", "song", "album", "concert"),
        (
            "be heard",
            "find fans",
            "sound great",
            "top the charts",
        ),
    ),
    "home": (
        ("house", "roof", "kitchen", "attic", "cellar"),
        ("be finished", "stay dry", "look new", "stay warm"),
    ),
    "pets": (
        ("cat", "dog", "parrot", "pony", "rabbit"),
        ("come back", "learn tricks", "sleep well", "eat more"),
    ),
    "school": (
        ("exam", "essay", "thesis", "lesson", "homework"),
        ("get done", "earn a prize", "impress", "make sense"),
    ),
    "cooking": (
        ("soup", "cake", "bread", "stew", "pie"),
        ("taste good", "turn out right", "feed us all", "be eaten"),
    ),
}
"""The subjects and the events of each topic."""

_TIMES = (
    "today",
    "tonight",
    "tomorrow",
    "this week",
    "this month",
    "this year",
    "this spring",
    "this summer",
    "this autumn",
    "this winter",
    "next week",
    "next month",
    "next year",
    "by Monday",
    "by Friday",
    "by June",
    "by noon",
    "in May",
    "soon",
    "one day",
)

TOOLS: Tools = {
    "weather": {"city": "string", "day": "string"},
    "clock": {"city": "string"},
    "moon": {"phase": "string", "season": "string"},
    "miles": {"km": "integer"},
}
"""The tools that a question of fact may need."""

_CITIES = ("Oslo", "Rome", "Lima", "Bern", "Kyiv", "Doha", "Pune", "Nuuk")
_SEASONS = ("spring", "summer", "autumn", "winter")
_FACT_OPENERS = (
    *("", "Please: ", "Tell me, ", "Quick: ", "Dear ball, ", "Say, ", "I ask you: ", "A fact, please: "),
    *("Look it up: ", "No magic: ", "Hello. ", "Now then: ", "One thing: ", "Ball, ", "Kindly: ", "Hear me: "),
    *("Hey, ", "In short: ", "Last one: ", "Help me: "),
)
_FACT_TAILS = (
    *("", " Thanks.", " Please.", " I must know.", " It matters.", " For a friend.", " For school.", " For work."),
    *(" Take care.", " No guessing.", " Be exact.", " I forgot.", " My son asks.", " We differ.", " Just curious."),
    *(" Go on.", " We bet on it.", " Hurry.", " So tell me.", " No joke."),
    *(" I am late.", " We wait.", " Be fair.", " Look twice.", " That is all."),
)

_WEATHER = (
    "what is the weather in {city} {day}?",
    "how is the weather in {city} {day}?",
    "is it raining in {city} {day}?",
    "how warm is it in {city} {day}?",
    "do I need a coat in {city} {day}?",
    "is the sun out in {city} {day}?",
)
_CLOCK = (
    "what time is it in {city}?",
    "what is the time in {city}?",
    "what hour is it in {city}?",
    "how late is it in {city}?",
    "what do the clocks say in {city}?",
    "is it night in {city} now?",
    "is it past noon in {city}?",
    "what is the local time in {city}?",
    "is it still early in {city}?",
    "what time do they have in {city}?",
    "what does a watch show in {city}?",
    "has the day begun in {city}?",
)
_MOON = (
    "when is the {phase} moon this {season}?",
    "which day has the {phase} moon this {season}?",
    "what is the date of the {phase} moon this {season}?",
    "on which night is the {phase} moon this {season}?",
    "how soon this {season} is the {phase} moon?",
    "this {season}, when is the {phase} moon?",
    "this {season}, which night has the {phase} moon?",
    "is the {phase} moon early or late this {season}?",
    "what day this {season} has a {phase} moon?",
    "when this {season} do we get a {phase} moon?",
    "has the {phase} moon of this {season} been yet?",
    "when do we see the {phase} moon this {season}?",
)
_MILES = (
    "how many miles are {km} km?",
    "how many miles is {km} km?",
    "what is {km} km in miles?",
    "what are {km} km in miles?",
    "how far in miles is {km} km?",
    "if it is {km} km, how many miles is that?",
    "how long in miles is a road of {km} km?",
    "if I walk {km} km, how many miles is that?",
    "what would {km} km be in miles?",
    "in miles, what is {km} km?",
    "in miles, how far is {km} km?",
    "how do you say {km} km in miles?",
    "how many miles make {km} km?",
    "what do {km} km come to in miles?",
    "how much is {km} km in miles?",
    "how many miles would {km} km be?",
)


def teacher_for(mood: str, topic: str) -> Teacher:
    """Return the teacher's distribution over all twenty answers to a question of that mood and topic."""
    own = ANSWERS[mood]
    lead = list(TOPICS).index(topic)
    others = [answer for answer in MOOD_OF if answer not in own]
    leaning = {own[(lead + rank) % len(own)]: part for rank, part in enumerate(_LEANING[mood])}
    return Teacher({answer: leaning.get(answer, _OTHERS // len(others)) for answer in MOOD_OF})


def magic_8_ball() -> Grammar:
    """Return the grammar of the Magic 8 Ball: 1,152,000 questions, 192,000 of which ask for a fact."""
    facts: tuple[tuple[str, tuple[str, ...], ArgumentValues], ...] = (
        ("weather", _WEATHER, {"city": _named(_CITIES), "day": _named(("today", "tomorrow"))}),
        ("clock", _CLOCK, {"city": _named(_CITIES)}),
        ("moon", _MOON, {"phase": _named(("full", "new")), "season": _named(_SEASONS)}),
        ("miles", _MILES, {"km": {str(km): km for km in range(3, 9)}}),
    )
    sections = [
        tool_section(tool, phrases, values, openers=_FACT_OPENERS, tails=_FACT_TAILS)
        for tool, phrases, values in facts
    ]
    return Grammar(KIND, [_futures(), *sections])


def _named(words: Iterable[str]) -> dict[str, str]:
    """Return an argument whose values are the words in the question."""
    return {word: word for word in words}


def _futures() -> Section:
    """Return the questions about the future."""
    teachers = {(mood, topic): teacher_for(mood, topic) for mood in ANSWERS for topic in TOPICS}
    openings = [(mood, opener) for mood, openers in _OPENERS.items() for opener in openers]
    themes = [
        (topic, noun, event) for topic, (nouns, events) in TOPICS.items() for noun in nouns for event in events
    ]

    def ask(opening: tuple[str, str], owner: str, theme: tuple[str, str, str], time: str) -> Question:
        mood, opener = opening
        topic, noun, event = theme
        prompt = f"{opener} will {owner} {noun} {event} {time}?"
        return Question(prompt, topic=topic, mood=mood, teacher=teachers[mood, topic])

    return Section((openings, _OWNERS, themes, _TIMES), ask, tuple(MOOD_OF))
