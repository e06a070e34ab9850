"""Write ``configs/quickstart.jsonl``: plain-English requests to a home assistant, each answered by one JSON tool call.

How the rows were made: the sentence patterns and word lists below were written for this project; this script fills
the patterns from the lists, draws a fixed number of distinct requests per tool with a seeded generator, and shuffles
them. No outside data is used. The same source always writes the same bytes.

What a model has to learn: which of the seven tools is meant, which words of the request to keep, and a few
normalisations: "turn off" is ``"level":0``, "half an hour" is ``"minutes":30``, "7 in the evening" is
``"time":"7:00 pm"``, and "will it rain in Oslo tomorrow?" keeps the city and the day but drops the question. Rows held
out for testing are new combinations of patterns and words that also occur in training, not new kinds of request.

Licence: MIT, like the rest of the project.

Usage: ``python scripts/make_quickstart_data.py [OUTPUT]``
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

SEED = 7
OUTPUT = Path(__file__).resolve().parent.parent / "configs" / "quickstart.jsonl"
SYSTEM = "Reply with one JSON tool call."

Value = str | int
Request = tuple[str, dict[str, Value]]

ROOMS = ["kitchen", "bedroom", "bathroom", "living room", "office", "hallway", "garage", "attic"]
NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Kevin", "Laura", "Martin"]
CITIES = [
    "Oslo",
    "Paris",
    "London",
    "Berlin",
    "Madrid",
    "Rome",
    "Vienna",
    "Dublin",
    "Boston",
    "Chicago",
    "Tokyo",
    "Sydney",
]
MUSIC = ["jazz", "rock", "classical", "blues", "swing", "reggae", "techno", "folk", "soul", "disco"]
DAYS = ["today", "tomorrow", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
TASKS = [
    "call the dentist",
    "water the plants",
    "feed the cat",
    "pay the rent",
    "take out the trash",
    "buy milk",
    "walk the dog",
    "book a table",
    "pick up the kids",
    "charge the car",
    "wash the dishes",
    "read the report",
    "check the oven",
    "take my pills",
]
NEWS = [
    "I am running late",
    "dinner is ready",
    "the train is delayed",
    "I am almost home",
    "the meeting is over",
    "the keys are under the mat",
    "I will call back soon",
    "the package is here",
    "we need more bread",
    "the car is fixed",
    "I am at the airport",
    "the game starts soon",
]
DURATIONS = {"half an hour": 30, "one hour": 60, "two hours": 120}


def clock(rng: random.Random) -> tuple[str, str]:
    """A time as people say it, and the same time written one way: ``7:30 pm``."""
    hour, minute, half = rng.randrange(1, 12), rng.choice(["", "", ":15", ":30", ":45"]), rng.choice(["am", "pm"])
    part = "morning" if half == "am" else "afternoon" if hour < 5 else "evening"
    said = rng.choice([half, f"in the {part}"])
    return f"{hour}{minute} {said}", f"{hour}{minute or ':00'} {half}"


def light(rng: random.Random) -> Request:
    room, percent = rng.choice(ROOMS), rng.randrange(5, 100, 5)
    off = [f"turn off the {room} lights", f"switch off the {room} light", f"lights off in the {room}"]
    full = [f"turn on the {room} lights", f"switch on the {room} light", f"lights on in the {room}"]
    some = [
        f"dim the {room} lights to {percent} percent",
        f"set the {room} light to {percent}%",
        f"put the lights in the {room} at {percent} percent",
        f"{room} lights at {percent}%",
    ]
    level, patterns = rng.choice([(0, off), (100, full)] * 2 + [(percent, some)])
    return rng.choice(patterns), {"tool": "set_light", "room": room, "level": level}


def thermostat(rng: random.Random) -> Request:
    room, degrees = rng.choice(ROOMS), rng.randrange(15, 27)
    patterns = [
        f"set the {room} to {degrees} degrees",
        f"make it {degrees} degrees in the {room}",
        f"heat the {room} to {degrees}",
        f"I want the {room} at {degrees} degrees",
        f"keep the temperature in the {room} at {degrees}",
    ]
    return rng.choice(patterns), {"tool": "set_thermostat", "room": room, "celsius": degrees}


def reminder(rng: random.Random) -> Request:
    task, (spoken, time) = rng.choice(TASKS), clock(rng)
    patterns = [
        f"remind me to {task} at {spoken}",
        f"at {spoken} I have to {task}, remind me",
        f"I must not forget to {task} at {spoken}",
        f"add a reminder for {spoken}: {task}",
    ]
    return rng.choice(patterns), {"tool": "add_reminder", "text": task, "time": time}


def music(rng: random.Random) -> Request:
    genre, room = rng.choice(MUSIC), rng.choice(ROOMS)
    patterns = [
        f"play some {genre} in the {room}",
        f"put on {genre} music in the {room}",
        f"I'd like to hear {genre} in the {room}",
        f"fill the {room} with {genre}",
        f"{genre} in the {room}, please",
    ]
    return rng.choice(patterns), {"tool": "play_music", "genre": genre, "room": room}


def message(rng: random.Random) -> Request:
    name, news = rng.choice(NAMES), rng.choice(NEWS)
    patterns = [
        f"tell {name} that {news}",
        f"text {name}: {news}",
        f"let {name} know that {news}",
        f"send {name} a message saying {news}",
        f"message {name} that {news}",
    ]
    return rng.choice(patterns), {"tool": "send_message", "to": name, "text": news}


def weather(rng: random.Random) -> Request:
    city, day = rng.choice(CITIES), rng.choice(DAYS)
    when = day if day in ("today", "tomorrow") else f"on {day}"
    patterns = [
        f"what's the weather in {city} {when}?",
        f"will it rain in {city} {when}?",
        f"how warm does it get in {city} {when}?",
        f"do I need an umbrella {when} in {city}?",
        f"forecast for {city} {when}",
    ]
    return rng.choice(patterns), {"tool": "get_weather", "city": city, "day": day}


def timer(rng: random.Random) -> Request:
    number = rng.randrange(2, 60)
    spoken, minutes = rng.choice([(f"{number} minutes", number)] * 2 + [rng.choice(list(DURATIONS.items()))])
    patterns = [
        f"set a timer for {spoken}",
        f"wake me in {spoken}",
        f"start a timer, {spoken}",
        f"count down {spoken}",
        f"give me {spoken} on the clock",
        f"ring a bell in {spoken}",
    ]
    return rng.choice(patterns), {"tool": "set_timer", "minutes": minutes}


# How many rows each tool gets: more where there is more to learn.
TOOLS: dict[Callable[[random.Random], Request], int] = {
    light: 80,
    thermostat: 45,
    reminder: 90,
    music: 45,
    message: 50,
    weather: 50,
    timer: 45,
}


def rows() -> list[dict[str, list[dict[str, str]]]]:
    """All rows in file order, no two with the same request."""
    rng = random.Random(SEED)
    answers: dict[str, str] = {}
    for tool, count in TOOLS.items():
        wanted = len(answers) + count
        while len(answers) < wanted:
            request, call = tool(rng)
            answers.setdefault(request[0].upper() + request[1:], json.dumps(call, separators=(",", ":")))
    pairs = sorted(answers.items())
    rng.shuffle(pairs)
    return [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": request},
                {"role": "assistant", "content": answer},
            ]
        }
        for request, answer in pairs
    ]


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8", newline="\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
