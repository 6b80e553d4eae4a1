"""The plain toy: small actions in a house, which are tool calls, and some small talk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from coremill.core.answer_key import Tools
from coremill.data.grammar import ArgumentValues, Grammar, Question, Section, Teacher, tool_section

KIND: Final = "toy"

TOOLS: Tools = {
    "lamp": {"room": "string", "on": "boolean"},
    "timer": {"minutes": "integer"},
    "play": {"genre": "string"},
    "heat": {"room": "string", "degrees": "integer"},
}
"""The tools for the actions."""

_ROOMS = ("kitchen", "bedroom", "hall", "office", "cellar", "attic", "garage", "nursery")
_GENRES = ("jazz", "rock", "folk", "blues", "swing", "opera", "soul", "techno")

_LAMP = (
    "turn {on} the lamp in the {room}.",
    "turn the {room} lamp {on}.",
    "switch the light {on} in the {room}.",
    "the lamp in the {room} should be {on}.",
)
_TIMER = (
    "set a timer for {minutes} minutes.",
    "wake me in {minutes} minutes.",
    "count down {minutes} minutes.",
    "tell me when {minutes} minutes are over.",
)
_PLAY = (
    "play some {genre}.",
    "put on some {genre}.",
    "I want to hear {genre}.",
    "let us listen to {genre}.",
    "start the {genre} list.",
    "some {genre} would be good.",
    "find me some {genre}.",
    "how about {genre}?",
)
_HEAT = (
    "heat the {room} to {degrees} degrees.",
    "make it {degrees} degrees in the {room}.",
    "set the {room} to {degrees} degrees.",
    "the {room} should have {degrees} degrees.",
)

REPLIES: Mapping[str, Mapping[str, int]] = {
    "greeting": {"Hello. What shall I do?": 6, "Good to hear you.": 3, "Yes?": 1},
    "thanks": {"You are welcome.": 7, "Any time.": 2, "It was no trouble.": 1},
    "goodbye": {"Goodbye.": 6, "See you soon.": 3, "Sleep well.": 1},
    "identity": {"I am a toy that runs small errands.": 8, "I switch things on and off.": 2},
}
"""The teacher of small talk: the replies to each topic and their parts of the probability."""

_SMALL_TALK: Mapping[str, tuple[str, ...]] = {
    "greeting": (
        *("hello there.", "good morning.", "good evening.", "are you awake?"),
        *("hi, can you hear me?", "I am home.", "is anyone there?", "nice to meet you."),
    ),
    "thanks": (
        *("thank you so much.", "that was good work.", "well done.", "I am grateful to you."),
        *("you did that well.", "many thanks.", "that helped a lot.", "you are a great help."),
    ),
    "goodbye": (
        *("that is all for now.", "goodbye.", "I am off to bed.", "see you tomorrow."),
        *("good night.", "I have to leave.", "we are done here.", "until next time."),
    ),
    "identity": (
        *("who are you?", "what are you?", "what can you do?", "tell me about yourself."),
        *("what is your job?", "are you a robot?", "what are you for?", "how can you help?"),
    ),
}

_OPENERS = ("", "Please, ", "Now, ", "Listen: ", "House, ", "Be so kind: ", "First, ", "Okay, ")
_TAILS = (
    "",
    " Thanks.",
    " Please.",
    " Right away.",
    " If you can.",
    " It is late.",
    " I am busy.",
    " Take your time.",
)


def toy() -> Grammar:
    """Return the grammar of the plain toy: 22,528 prompts, 20,480 of which are actions."""
    rooms = {room: room for room in _ROOMS}
    actions: tuple[tuple[str, tuple[str, ...], ArgumentValues], ...] = (
        ("lamp", _LAMP, {"room": rooms, "on": {"on": True, "off": False}}),
        ("timer", _TIMER, {"minutes": {str(minutes): minutes for minutes in range(2, 18)}}),
        ("play", _PLAY, {"genre": {genre: genre for genre in _GENRES}}),
        ("heat", _HEAT, {"room": rooms, "degrees": {str(degrees): degrees for degrees in range(15, 19)}}),
    )
    sections = [
        tool_section(tool, phrases, values, openers=_OPENERS, tails=_TAILS) for tool, phrases, values in actions
    ]
    return Grammar(KIND, [*sections, _small_talk()])


def _small_talk() -> Section:
    teachers = {topic: Teacher(replies) for topic, replies in REPLIES.items()}
    talk = [(topic, phrase) for topic, phrases in _SMALL_TALK.items() for phrase in phrases]

    def ask(opener: str, remark: tuple[str, str], tail: str) -> Question:
        topic, phrase = remark
        text = opener + phrase + tail
        return Question(text[0].upper() + text[1:], topic=topic, mood=None, teacher=teachers[topic])

    return Section((_OPENERS, talk, _TAILS), ask, tuple(reply for replies in REPLIES.values() for reply in replies))
