"""Small files in the exact schemas of the real data sets, spelling noise and mixed types included."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

from PIL import Image

# the 19 templates of Kvasir-VQA as they are spelt there, each with answers that occur in it
KVASIR = {
    "Have all polyps been removed?": ["no", "yes", "not relevant"],
    "Is this finding easy to detect?": ["yes", "no"],
    "Is there a green/black box artefact?": ["no", "yes"],
    "Is there text?": ["no", "yes"],
    "Does this image contain any finding?": ["no"],
    "How many findings are present?": ["1", "0", "2", "16"],
    "How many polyps are in the image?": ["0", "1", "6"],
    "How many instrumnets are in the image?": ["0", "1"],
    "What type of procedure is the image taken from?": ["colonoscopy", "gastroscopy"],
    "What type of polyp is present?": ["none", "paris ip", "paris is", "paris iia"],
    "What is the size of the polyp?": ["none", "<5mm", "5-10mm", "11-20mm", ">20mm", ">20"],
    "Are there any abnormalities in the image? Check all that are present.": ["polyp", "ulcerative colitis", "none"],
    "Are there any anatomical landmarks in the image? Check all that are present.": ["none", "z-line", "cecum"],
    "Are there any instruments in the image? Check all that are present.": ["none", "polyp snare; tube"],
    "Where in the image is the abnormality?": ["center", "lower-rigth; center", "none"],
    "Where in the image is the instrument?": ["none", "lower-right", "upper-left; center"],
    "Where in the image is the anatomical landmark?": ["none", "center"],
    "What color is the abnormality? If more than one separate with ;": ["pink; red", "pink", "none"],
    "What color is the anatomical landmark? If more than one separate with ;": ["none", "pink"],
}


def jpeg(seed: int, size: tuple[int, int] = (40, 32)) -> bytes:
    rng = random.Random(seed)
    picture = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    picture.paste(tuple(rng.randrange(256) for _ in range(3)), (4, 4, 4 + rng.randrange(8, 24), 20))
    out = io.BytesIO()
    picture.save(out, "JPEG")
    return out.getvalue()


def picture_name(index: int) -> str:
    """An identifier like those of the real data (``cl8k2u1pm1dw7083203g1b7yv``)."""
    rng = random.Random(f"picture {index}")
    return "cl8k2u1" + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=18))


def kvasir_rows(pictures: int) -> list[dict]:
    rows = []
    for index in range(pictures):
        rng = random.Random(index)
        data = jpeg(index)
        for question, answers in KVASIR.items():
            rows.append(
                {
                    "image": {"bytes": data, "path": f"{picture_name(index)}.jpg"},
                    "source": rng.choice(["Normal", "Polyps", "Esophagitis", "Ulcerative Colitis", "Instrument"]),
                    "question": question,
                    "answer": rng.choices(answers, weights=range(len(answers) + 1, 1, -1))[0],
                    "img_id": picture_name(index),
                }
            )
    return rows


def write_kvasir(directory: Path, pictures: int = 40) -> Path:
    """``data/raw-00000-of-00002.parquet``, ...: two files, pictures embedded, as the Hub repository has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = kvasir_rows(pictures)
    (directory / "data").mkdir(parents=True)
    half = len(rows) // 2
    for part, chunk in enumerate((rows[:half], rows[half:])):
        pq.write_table(pa.Table.from_pylist(chunk), directory / "data" / f"raw-0000{part}-of-00002.parquet")
    return directory


SPORTS = ("soccer", "Basketball", "baseball", "Badminton", "american_football", "ice_hockey", "volleyball")


def sportu_rows(clips: int) -> list[dict]:
    rows = []
    for index in range(clips):
        rng = random.Random(index)
        # two views of every scene, as many SPORTU clips have
        name = f"{SPORTS[index // 2 % len(SPORTS)]}_{index // 2}_{index % 2}"
        rows.append(
            {
                "id": name,
                "question": "How many players are shown in total in this video?",
                "options": {"A": 4, "B": 6, "C": 5, "D": 2},
                "answer": rng.choice("ABCD"),
                "difficulty level": "easy",
            }
        )
        rows.append(
            {
                "id": name,
                "question": "Is there a rule violation in the video?",
                "options": {"A": "No", "B": "Yes"},
                "answer": rng.choice("AB"),
                "difficulty level": "medium",
            }
        )
        rows.append(
            {
                "id": name,
                "question": "What kind of foul does this video show?",
                "options": {"A": "Trip", "B": "Push, with the hands", "C": "Holding", "D": "None of the above"},
                "answer": rng.choice("ABCDDD"),
                "difficulty level": "hard",
            }
        )
    return rows


def write_sportu(directory: Path, clips: int = 40, *, videos: bool = True) -> Path:
    """The SPORTU repository: ``data/*.json`` as spelt there, and MP4 clips, every fifth one as a frame directory."""
    (directory / "data").mkdir(parents=True)
    rows = sportu_rows(clips)
    (directory / "data" / "SportU_Video_mc.json").write_text(json.dumps(rows))
    names = list(dict.fromkeys(row["id"] for row in rows))
    why = [
        {
            "id": name,
            "question": "Why is it a foul in the video?",
            "answer": "player in white jersey pushes player in blue",
            "difficulty level": "hard",
        }
        for name in names
    ]
    (directory / "data" / "SportU_video_oe.json").write_text(json.dumps(why))
    text = [
        {"question": "Which are fouls?\nA. push\nB. goal\nC. trip", "Answer": "A, C", "Explanation": "Both are."}
    ] * 3
    (directory / "data" / "SportU_text.json").write_text(json.dumps(text))
    if videos:
        for index, name in enumerate(names):
            if index % 5 == 4:
                write_frames(directory / "videos" / name, 5, index)
            else:
                write_mp4(directory / "videos" / f"{name}.mp4", 7, index)
    return directory


def frame(index: int, seed: int) -> Image.Image:
    """A grey level that tells the frame's index: 20 more each frame."""
    return Image.new("RGB", (32, 32), (20 + 20 * index,) * 3)


def write_frames(directory: Path, count: int, seed: int) -> None:
    directory.mkdir(parents=True)
    for index in range(count):
        frame(index, seed).save(directory / f"frame_{index:03d}.png")


def write_mp4(path: Path, count: int, seed: int) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for index in range(count):
            container.mux(stream.encode(av.VideoFrame.from_image(frame(index, seed))))
        container.mux(stream.encode())


def write_kvasir_x1(directory: Path, pictures: int = 40) -> Path:
    """Kvasir-VQA-x1: questions without pictures, its train and test files sharing pictures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"train": [], "test": []}
    for index in range(pictures):
        for complexity in (1, 2, 3):
            rows["test" if (index + complexity) % 2 else "train"].append(
                {
                    "img_id": picture_name(index),
                    "complexity": complexity,
                    "question": "What does the image show, and is there text?",
                    "answer": f"The image shows {complexity} pink polyps, and no text is visible.",
                    "original": json.dumps([{"q": "Is there text?", "a": "no"}]),
                    "question_class": ["text_presence"],
                }
            )
    (directory / "data").mkdir(parents=True)
    for name, chunk in rows.items():
        pq.write_table(pa.Table.from_pylist(chunk), directory / "data" / f"{name}-00000-of-00001.parquet")
    return directory


SPORTR = {
    "Is there a rule infraction in this image?": ["Yes", "No"],
    "Which rule infraction does this image show?": ["Blocking foul", "Hand ball", "No infraction"],
}


def sportr_rows(pictures: int) -> list[dict]:
    rows = []
    for index in range(pictures):
        rng = random.Random(index)
        sport = ("basketball", "soccer", "american_football", "badminton", "table_tennis")[index % 5]
        for question, answers in SPORTR.items():
            rows.append({"image": f"{sport}_{index + 1}.png", "question": question, "answer": rng.choice(answers)})
    return rows


def write_sportr(directory: Path, pictures: int = 40) -> Path:
    """SportR: pictures as on the Hub, questions as one plain list of entries; a clip's question among them."""
    (directory / "SportsImage").mkdir(parents=True)
    rows = sportr_rows(pictures)
    for name in dict.fromkeys(row["image"] for row in rows):
        noise = random.Random(name).randbytes(32 * 24 * 3)
        Image.frombytes("RGB", (32, 24), noise).resize((96, 72)).save(directory / "SportsImage" / name)
    clip = {"video": "Soccer12.mp4", "question": "Is there a foul?", "answer": "Yes"}
    (directory / "SportR_image_qa.json").write_text(json.dumps([*rows, clip]))
    return directory
