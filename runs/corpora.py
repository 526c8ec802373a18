"""Where the data and models of Slam are, and fetching as much of them as a run will consume.

    python runs/corpora.py page --hours 20000     # what each step of runs/slam.sh needs: hours, network, disk
    python runs/corpora.py list --hours 20000     # the pieces: a random, reproducible share of each corpus
    python runs/corpora.py get libri_light/large-017 --out data        # fetch a piece, a benchmark or the pairs
    python runs/corpora.py models Qwen/Qwen2.5-0.5B published          # fetch models by name; published: the vocoder

A piece is an archive, or 30 GB of a larger one, so that one is tokenised while the next is fetched, and a small disk
is enough. `--sources FILE.json` names other sources, in the form of SOURCES below.
"""
import argparse
import json
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from runs.download import extract, fetch, fetch_tar_piece

OPENSLR = "https://www.openslr.org/resources/12/"
LIBRI_LIGHT = "https://dl.fbaipublicfiles.com/librilight/data/"
DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="


@dataclass(frozen=True)
class Source:
    """One archive, or a repository of the hub."""
    url: str  # https://, file:// or hf://OWNER/NAME/PATTERN, a dataset of the hub; {:05d} in it: the number of a file
    gb: float  # about how large it is
    hours: float = 0.0  # of speech in it, about
    size: int = 0  # bytes, exactly; 0: not known
    digest: str = ""  # "sha256:…" or "md5:…" as published; empty: not known, so the first download is trusted
    pieces: int = 1  # an uncompressed tar, or a pattern of numbered files, is fetched in so many
    files: int = 0  # numbered files of the pattern
    unpack: str = ""  # unpack the files whose path contains this; `*`: all
    name: str = ""  # of the archive here; empty: the URL's


# Checked against what others publish, not against the servers, which could not be reached from where this was written:
# - LibriSpeech: sizes as in Kaldi's librispeech recipe, sha256 as in torchaudio's LIBRISPEECH. OpenSLR itself has
#   md5sum.txt beside the files. CC BY 4.0.
# - Libri-Light: hours, sizes and md5 as in facebookresearch/libri-light, data_preparation/README.md. large.tar is taken
#   in pieces, so its md5 can't be checked; the server must give ranges of bytes, which has not been tried.
# - sTinyStories: the hub's file list (2,191 files of 1.4 to 1.6 GB); hours from the paper. MIT.
# - SpokenSwag: the hub's file list (58 files of train); their size, half a GB each, is the datasets library's default.
# - sLM21: URL and size as in ESPnet's notes; no sum is known. StoryCloze: the two links in slp-rl/SpokenStoryCloze's
#   README; sizes, sums and the kind of archive are not known.
SOURCES = {
    "librispeech_dev/dev-clean": Source(OPENSLR + "dev-clean.tar.gz", 0.34, 5.4, 337_926_286,
        "sha256:76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3"),
    "librispeech_dev/dev-other": Source(OPENSLR + "dev-other.tar.gz", 0.31, 5.3, 314_305_928,
        "sha256:12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365"),
    "librispeech/train-clean-100": Source(OPENSLR + "train-clean-100.tar.gz", 6.4, 100.6, 6_387_309_499,
        "sha256:d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2"),
    "librispeech/train-clean-360": Source(OPENSLR + "train-clean-360.tar.gz", 23.0, 363.6, 23_049_477_885,
        "sha256:146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf"),
    "librispeech/train-other-500": Source(OPENSLR + "train-other-500.tar.gz", 30.6, 496.7, 30_593_501_606,
        "sha256:ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2"),
    "libri_light/small": Source(LIBRI_LIGHT + "small.tar", 35, 577, digest="md5:c49207eb86a8e8ac895561c37232041e"),
    "libri_light/medium": Source(LIBRI_LIGHT + "medium.tar", 321, 5_193, pieces=11),
    "libri_light/large": Source(LIBRI_LIGHT + "large.tar", 3_050, 51_934, pieces=102),
    "stinystories/part": Source("hf://slprl/sTinyStories/data/data-{:05d}-of-02191.parquet", 3_300, 30_000, pieces=110,
        files=2_191),
    "pairs/spoken_swag": Source("hf://slprl/SpokenSwag/data/*", 41),
    "bench/sLM21-dataset/syntactic/dev": Source("https://download.zerospeech.com/datasets/sLM21.dataset.zip", 30.6,
        unpack="syntactic/dev/"),
    "bench/sSC": Source(DRIVE + "19ZnkM4vjApCZipd7xQ1ESlOi5oBVrlFL", 1, unpack="*", name="sSC.zip"),
    "bench/tSC": Source(DRIVE + "17prYkldYb3w3Pyg3Pm77-VnE6nkD5jzG", 1, unpack="*", name="tSC.zip"),
}
# Corpora are mixed by size; these are the hours that the paper trains on.
MIX = {"libri_light": 50_000, "librispeech": 960, "stinystories": 30_000}


def read_sources(file: str) -> dict[str, Source]:
    """SOURCES, or those of a JSON file {name: {"url": …, "gb": …, …}}. SystemExit if it is no such file."""
    if not file:
        return SOURCES
    try:
        return {name: Source(**fields) for name, fields in json.loads(Path(file).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise SystemExit(f"--sources={file}: not a list of sources ({e}); runs/corpora.py has its fields") from None


def pieces(sources: dict[str, Source]) -> dict[str, tuple[Source, int]]:
    """{name of a piece: (its source, its number)}: "libri_light/large-017", or the source's name if it is one piece."""
    return {f"{name}-{i:03d}" if source.pieces > 1 else name: (source, i)
            for name, source in sources.items() for i in range(source.pieces)}


def draw(sources: dict[str, Source], hours: float, seed: int = 0) -> list[str]:
    """Names of the pieces to train on: of each corpus in MIX, in an order drawn by the seed, until it has its share.

    The share of `hours` is that in MIX, rounded up to a whole piece; more hours draw the same pieces first.
    """
    found = []
    for corpus, part in MIX.items():
        names = [name for name in pieces(sources) if name.startswith(f"{corpus}/")]
        random.Random(f"{seed} {corpus}").shuffle(names)
        have = 0.0
        while names and have < hours * part / sum(MIX.values()):
            source, _ = pieces(sources)[names[0]]
            have += source.hours / source.pieces
            found.append(names.pop(0))
    return found


def get(name: str, sources: dict[str, Source], out: Path) -> Path:
    """Fetch a piece into the folder OUT/NAME, which is there only when it is whole. SystemExit if it can't be."""
    if name not in pieces(sources):
        raise SystemExit(f"{name}: no such piece; `python runs/corpora.py list` names those of the corpora")
    (source, number), folder = pieces(sources)[name], out / name
    if folder.is_dir():
        return folder
    new, file, sums = out / f"{name}.part", source.name or source.url.rpartition("/")[2], out / "fetched.jsonl"
    if source.url.startswith("hf://"):
        from slam.download import from_hub  # here, since `page` runs before numpy is installed
        owner, repo, pattern = source.url.removeprefix("hf://").split("/", 2)
        files = range(source.files * number // source.pieces, source.files * (number + 1) // source.pieces)
        from_hub(f"{owner}/{repo}", [pattern.format(i) for i in files] or [pattern], "dataset", new)
        if not any(new.rglob("*.parquet")):
            raise SystemExit(f"{source.url}: no such files in the repository; look at its page, and correct "
                             f"runs/corpora.py or --sources")
    else:
        if source.pieces > 1:
            fetch_tar_piece(source.url, new / file, number, source.pieces, sums)
        else:
            fetch(source.url, new / file, source.digest, source.size, sums=sums)
        if source.unpack:
            extract(new / file, folder, source.unpack.replace("*", ""))
            shutil.rmtree(new)
            return folder
    new.rename(folder)
    return folder


# ---------------------------------------------------------------- the first page
def page(sources: dict[str, Source], hours: float, seed: int, train: str) -> str:
    """What each step needs. Predicted for an A5000, but for training and DPO, whose hours are the paper's.

    train: hours of training, as text.
    """
    drawn, known = draw(sources, hours, seed), pieces(sources)
    speech = sum(s.hours / s.pieces for s, _ in map(known.get, drawn))
    gb = sum(s.gb / s.pieces for s, _ in map(known.get, drawn))
    largest = max((s.gb / s.pieces for s, _ in map(known.get, drawn)), default=0)
    bench = sum(s.gb for name, s in sources.items() if name.startswith("bench/"))
    pairs = sum(s.gb for name, s in sources.items() if name.startswith("pairs/"))
    rows = [("step", "hours", "network", "disk", ""),
            ("setup", "0.1", "6 GB", "7 GB", "torch with CUDA, transformers, into .venv"),
            ("models", "0.1", "8 GB", "8 GB", "base, encoder, k-means, vocoder, ASR, judge (needs an account)"),
            ("bench", "0.3", f"{bench:,.0f} GB", f"{bench + 6:,.0f} GB", "sBLIMP, both StoryClozes"),
            ("speech", f"{speech / 2500:,.0f}-{speech / 1000:,.0f}", f"{gb:,.0f} GB", f"{2 * largest:,.0f} GB",
             f"{speech:,.0f} h of speech in {len(drawn)} pieces to units; the next is fetched meanwhile"),
            ("pairs", "0.3", f"{pairs:,.0f} GB", f"{pairs:,.0f} GB", "SpokenSwag to units"),
            ("train", train, "", "9 GB", "the paper's hours, on its hardware"), ("dpo", "0.5", "", "9 GB", ""),
            ("evaluate", "0.5", "", "", "benchmarks, GenPPL, auto-BLEU; out/results.md"), ("sample", "0.1", "", "", "")]
    lines = [f"{a:10}{b:>8}{c:>12}{d:>10}  {e}".rstrip() for a, b, c, d, e in rows]
    network = (gb + bench + pairs + 14) / 450  # hours: 1 Gbit/s is 450 GB an hour
    return "\n".join([*lines, f"Network: {network:,.1f} h at 1 Gbit/s. Hours: predictions for an RTX A5000. Disk: the "
                      f"most at a time; a piece is removed when it is tokenised."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("page", "list", "get", "models"))
    parser.add_argument("names", nargs="*", help="of pieces, or of models")
    parser.add_argument("--hours", type=float, default=20_000, help="of speech to draw, over all corpora [20000]")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder for what is fetched [data]")
    parser.add_argument("--sources", default="", help="JSON file of other sources")
    parser.add_argument("--train", default="23.5", help="page: hours of training")
    args = parser.parse_args()
    sources = read_sources(args.sources)
    if args.command == "page":
        print(page(sources, args.hours, args.seed, args.train))
    elif args.command == "list":
        print("\n".join(draw(sources, args.hours, args.seed)))
    elif args.command == "get":
        for name in args.names:
            print(get(name, sources, args.out))
    else:
        from slam.checkpoint import fetch as model
        from slam.hifigan import HifiGan
        for name in args.names:
            print(HifiGan.read(name) and name if name == "published" else model(name))


if __name__ == "__main__":
    sys.exit(main())
