"""The published files of PatchCamelyon: rows, checksums, slide names, and how to compare files."""

from lib.files import file_digest
from lib.pcam import split_path

# Zenodo record 2546921: number of rows, and MD5 of the meta CSV and of x and y, packed (.h5.gz) and
# unpacked (.h5). Other published tables have valid and test exchanged; this one agrees with the
# names of the slides
OFFICIAL = {
    "train": {"rows": 262_144, "meta": "5a3dd671e465cfd74b5b822125e65b0a",
              "x": ("1571f514728f59376b705fc836ff4b63", "01844da899645b4d6f84946d417ba453"),
              "y": ("35c2d7259d906cfc8143347bb8e05be7", "0781386bf6c2fb62d58ff18891466aca")},
    "valid": {"rows": 32_768, "meta": "67589e00a4a37ec317f2d1932c7502ca",
              "x": ("d5b63470df7cfa627aeec8b9dc0c066e", "81cf9680f1724c40673f10dc88e909b1"),
              "y": ("2b85f58b927af9964a4c15b8f7e8f179", "94d8aacc249253159ce2a2e78a86e658")},
    "test": {"rows": 32_768, "meta": "3455fd69135b66734e1008f3af684566",
             "x": ("d8c2d60d490dbd479f8199bdfa0cf6ec", "2614b2e6717d6356be141d9d6dbfcb7e"),
             "y": ("60a7035772fbdb7f34eb86d4420cf66a", "11ed647efe9fe457a4eb45df1dba19ba")},
}  # fmt: skip


def compare_md5(directory, split: str, official: dict = OFFICIAL) -> list[str]:
    """A sentence for each file of a split that is not the published file. It names the split to
    which the file belongs, if there is one.
    """
    findings = []
    for part in ("x", "y", "meta"):
        path = split_path(directory, split, part)
        if not path.exists():
            continue
        md5 = file_digest(path, "md5")
        owners = [name for name, sums in official.items() if md5 in sums[part]]
        if owners != [split]:
            owner = f", it is that of {owners[0]}" if owners else ""
            findings.append(f"{path.name}: MD5 {md5} is not that of the published {split}{owner}")
    return findings
