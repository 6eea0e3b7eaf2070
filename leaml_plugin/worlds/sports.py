"""The sports world: three-frame clips under multiple choice in the manner of SPORTU, with its difficulty levels.

Easy asks what is seen (sport, jerseys, counts), Medium what happens (actions, places), Hard what the rules say of it
(violations and decisions). Options are shuffled; 'None of the above' is right as often as any letter.
Does not cover sport: courts, actions and signals are drawings in which every role has one of the general world's
shapes and every action one of its motions.
"""

from __future__ import annotations

from leaml_plugin.worlds import raster
from leaml_plugin.worlds.balance import choose
from leaml_plugin.worlds.general import animate, place
from leaml_plugin.worlds.raster import COLORS, RADIUS, UNIT
from leaml_plugin.worlds.rng import Rng
from leaml_plugin.worlds.scenes import MOTIONS, POSITIONS, Scene, Thing, WorldQA, offer, teacher

WHITE = (236, 236, 236)
# sport -> (court colour, pattern, lines drawn on it, the ground in the general world's words)
COURTS = {
    "soccer": ((58, 140, 62), "lined", "circle", "Lined green background"),
    "basketball": ((214, 142, 66), "lined", "circle", "Lined orange background"),
    "american football": ((52, 108, 58), "plain", "yards", "Plain green background"),
    "volleyball": ((222, 202, 84), "plain", "middle", "Plain yellow background"),
    "badminton": ((64, 92, 190), "plain", "middle", "Plain blue background"),
    "ice hockey": ((222, 228, 232), "cloudy", "circle", "Cloudy white background"),
    "baseball": ((138, 92, 54), "speckled", "", "Speckled brown background"),
}
PLAYER, KEEPER, BALL, GOAL, STICK = "square", "diamond", "circle", "ring", "bar"
VIOLATIONS = {"cross": "holding", "star": "offside", "triangle": "traveling", "crescent": "tripping"}
DECISIONS = {"holding": "free throw", "offside": "indirect kick", "traveling": "turnover", "tripping": "penalty shot"}
# what the actor does -> the action's name; the actor is the ball for motions and a player for changes
ACTIONS = {
    "left": "handoff", "right": "serve", "up": "lob", "down": "smash",
    "grows": "tackle", "shrinks": "dive", "appears": "substitution", "disappears": "ejection",
}  # fmt: skip
EQUIPMENT = {GOAL: "goal", STICK: "stick"}


def scene(index: int, seed: int) -> Scene:
    """One clip with up to six questions."""
    rng = Rng("sports", seed, index)
    sport = rng.choice(list(COURTS))
    color, pattern, lines, ground = COURTS[sport]
    motion = rng.choice(list(ACTIONS))
    hues = rng.shuffled([c for c in COLORS if raster.distance(COLORS[c], color) > 9000])
    home, away, keeper_hue, referee_hue = hues[:4]
    cells = rng.shuffled(range(9))
    size = rng.choice(("medium", "large"))
    if motion in MOTIONS:
        dx, dy = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[motion]
        lane = rng.below(3)
        start = (lane * 3 + (0 if dx > 0 else 2)) if dx else (lane + 3 * (0 if dy > 0 else 2))
        path = [start + k * (dx + 3 * dy) for k in range(3)]
        cells = [c for c in cells if c not in path]
        ball_size = rng.choice(("small", "medium"))
        actor = Thing(
            BALL,
            rng.choice([c for c in hues if c not in (home, away)]),
            ball_size,
            "plain",
            place(rng, start, ball_size),
        )
        count = rng.between(1, 3)
        players = []
    else:
        actor = Thing(PLAYER, rng.choice((home, away)), "medium", "plain", place(rng, cells.pop(), "medium"))
        players = [actor]
        count = rng.between(0, 3)
    for _ in range(count):
        players.append(Thing(PLAYER, rng.choice((home, away)), size, "plain", place(rng, cells.pop(), size)))
    others = [p for p in players if p is not actor]
    keeper = (
        Thing(KEEPER, keeper_hue, "large", "plain", place(rng, cells.pop(), "large"))
        if cells and rng.chance(50)
        else None
    )
    violation = rng.choice(list(VIOLATIONS)) if cells and rng.chance(65) else ""
    signal = Thing(violation, referee_hue, "large", "plain", place(rng, cells.pop(), "large")) if violation else None
    gear = rng.choice((GOAL, STICK)) if cells and rng.chance(60) else ""
    item = None
    if gear:
        item = Thing(
            gear, rng.choice([c for c in hues[4:]] or hues), "large", "plain", place(rng, cells.pop(), "large")
        )
    still = [t for t in (*others, keeper, signal, item) if t]
    frames_things = animate(rng, [actor, *still], motion)

    court = raster.background(rng, raster.jitter(rng, color, 10), pattern, strength=14, period=12, turn=0)
    if lines == "circle":
        raster.circle_line(court, (48, 48), 20, 2, WHITE, 70)
        raster.line(court, (48, 48), 0, 2, WHITE, 70)
    elif lines == "yards":
        for x in (12, 36, 60, 84):
            raster.line(court, (x, 48), 6, 2, WHITE, 75)
    elif lines == "middle":
        raster.line(court, (48, 48), 6, 2, WHITE, 70)
        for y in (6, 90):
            raster.line(court, (48, y), 0, 1, WHITE, 70)
    rgb = {c: raster.jitter(rng, COLORS[c], 10) for c in COLORS}
    turn = rng.below(24)
    frames = []
    for visible in frames_things:
        canvas = court.copy()
        for t in visible:
            r = RADIUS[t.size]
            shadow = (t.center[0] + 2 * UNIT, t.center[1] + r * 8 // 10)
            raster.draw(canvas, "circle", shadow, r * 6 // 10, (10, 10, 10), alpha=30)
            raster.draw(
                canvas, t.shape, t.center, r, rgb[t.color], "plain",
                turn=turn if t.shape == STICK else 0, outline=30, shading=15,
            )  # fmt: skip
            if t.shape in (PLAYER, KEEPER):  # a head
                raster.draw(canvas, "circle", (t.center[0], t.center[1] - r * 9 // 10), r * 4 // 10, (226, 178, 140))
        raster.grain(rng, canvas, 5)
        frames.append(raster.finish(canvas))

    does = f"moving {motion}" if motion in MOTIONS else f"that {motion}"
    everything = [actor, *still]
    true_caption, caption = teacher(rng, [(t, does if t is actor else "") for t in everything], ground)
    facts = {"sport": sport, "motion": motion, "violation": VIOLATIONS.get(violation, "")}
    qas = choose(rng, "sports", questions(rng, facts, players, keeper, signal, item, (home, away)), 6)
    return Scene(
        "sports", seed, index, tuple(frames), tuple(tuple(f) for f in frames_things), tuple(qas), true_caption, caption,
        facts,
    )  # fmt: skip


def _ask(rng: Rng, template: str, level: str, question: str, truth: str, domain: list[str], **kw) -> WorldQA:
    options, letter = offer(rng, truth, [d for d in domain if d != truth], **kw)
    return WorldQA(template, question, letter, "choice", level, options)


def questions(rng, facts, players, keeper, signal, item, teams) -> list[WorldQA]:
    """Every question that applies to a clip."""
    out = [_ask(rng, "sport", "Easy", "What sport is shown in the video?", facts["sport"], list(COURTS))]
    if players:
        counts = ["1", "2", "3", "4", "5"]
        out.append(
            _ask(rng, "players", "Easy", "How many players are visible in the video?", str(len(players)), counts)
        )
        first, second = (sum(p.color == t for p in players) for t in teams)
        if first != second:
            more = teams[0] if first > second else teams[1]
            q = "Which jersey color do most of the players wear?"
            out.append(_ask(rng, "team", "Easy", q, more, [*teams, *rng.shuffled(list(COLORS))]))
    if keeper:
        q = "What color is the goalkeeper's jersey?"
        out.append(_ask(rng, "keeper", "Easy", q, keeper.color, list(COLORS)))
        q = "Where does the goalkeeper stand?"
        out.append(_ask(rng, "keeper-place", "Medium", q, keeper.position, list(POSITIONS)))
    if item:
        q = f"Where in the video is the {EQUIPMENT[item.shape]}?"
        out.append(_ask(rng, "gear-place", "Medium", q, item.position, list(POSITIONS)))
    q = rng.choice(("What action is performed in the video?", "Which technique does the video show?"))
    out.append(_ask(rng, "action", "Medium", q, ACTIONS[facts["motion"]], list(ACTIONS.values())))
    if signal:
        q = rng.choice(("Which violation does the referee call?", "What rule is broken in the video?"))
        out.append(_ask(rng, "violation", "Hard", q, facts["violation"], list(VIOLATIONS.values())))
        q = "What should the referee's decision be?"
        out.append(_ask(rng, "decision", "Hard", q, DECISIONS[facts["violation"]], list(DECISIONS.values())))
    answer = "A" if signal else "B"
    q = "Is there a violation in this clip?"
    out.append(WorldQA("foul", q, answer, "choice", "Hard", {"A": "Yes", "B": "No"}))
    return out
