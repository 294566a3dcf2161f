"""Whether a scene keeps the rules that scenes are chosen by, and whether facts hold in it."""

from cascade.scenes import spec
from cascade.scenes.captions import Facts, Thing
from cascade.scenes.spec import GAP, MARGIN, Object, Scene


def violations(scene: Scene) -> list[str]:
    """What is too near the frame or another object, in words; empty for every chosen scene."""
    found = []
    for i, a in enumerate(scene.objects):
        if spec._frame_distance(a) < MARGIN - 1e-9:
            found.append(f"object {i} is nearer than {MARGIN} to the frame")
        for j, b in enumerate(scene.objects[:i]):
            if spec._box_distance(a, b) < GAP - 1e-9 and not (
                spec._fits_inside(a, b) or spec._fits_inside(b, a)
            ):
                found.append(f"objects {j} and {i} are nearer than {GAP}")
    return found


def false_facts(facts: Facts, scene: Scene) -> list[str]:
    """What `facts` assert that is not so in `scene`, in words; empty where all hold.

    The scene may come from anywhere, a reading of a generated picture included. Only its objects
    and its background are looked at.
    """
    wrong = []
    found: list[list[Object]] = []
    for thing in facts.things:
        alike = [
            item
            for item in scene.objects
            if item.shape == thing.shape
            and item.colour == thing.colour
            and thing.size in (None, item.size)
            and thing.finish in (None, item.finish)
        ]
        found.append(alike)
        if len(alike) != thing.count:
            wrong.append(f"{thing.count} of {_label(thing)}: there are {len(alike)}")
    expected = sum(thing.count for thing in facts.things)
    if len(scene.objects) != expected:
        wrong.append(f"{expected} objects in all: there are {len(scene.objects)}")
    for said in facts.relations:
        a, b = found[said.subject], found[said.object]
        if not (a and b and spec.relation_holds(a, said.relation, b)):
            names = [_label(facts.things[i]) for i in (said.subject, said.object)]
            wrong.append(f"{names[0]} {said.relation} {names[1]}")
    if facts.background not in (None, scene.background):
        wrong.append(f"on {facts.background}: it is on {scene.background}")
    return wrong


def _label(thing: Thing) -> str:
    words = [thing.size, thing.finish, thing.colour, thing.shape]
    return " ".join(word for word in words if word)
