"""Turns saved results into the README's table: python benchmarks/report.py results.json"""

import json
import math
import sys
from collections import defaultdict


def main(path):
    with open(path) as file:
        results = json.load(file)
    medians = defaultdict(dict)
    for result in results["benchmarks"]:
        info = result["extra_info"]
        medians[tuple(info["shape"])][info["work"], info["contender"]] = result["stats"]["median"]

    works = ["inference", "training"]
    print("| B, T, I, H | " + " | ".join(f"{w}: nn.RNN | rnnfast | ratio" for w in works) + " |")
    print("| --- |" + " --- |" * 3 * len(works))
    ratios = defaultdict(list)
    for shape, times in medians.items():
        cells = [", ".join(map(str, shape))]
        for work in works:
            theirs, ours = times[work, "nn.RNN"], times[work, "rnnfast.RNN"]
            ratios[work].append(theirs / ours)
            cells += [f"{theirs * 1e6:.0f} us", f"{ours * 1e6:.0f} us", f"**{theirs / ours:.1f}**"]
        print("| " + " | ".join(cells) + " |")
    means = (math.exp(sum(map(math.log, ratios[w])) / len(ratios[w])) for w in works)
    print("| geometric mean | " + " | ".join(f" | | **{mean:.1f}**" for mean in means) + " |")

    machine = results["machine_info"]
    about = machine["rnnfast"]
    print(
        f"\n{machine['cpu'].get('brand_raw', machine['processor'])}, {about['cpu_capability']}, "
        f"{about['threads']} thread(s); torch {about['torch']}, Python {about['python']}; "
        f"rnnfast {about['rnnfast']} at commit {results['commit_info']['id'][:10]}; medians."
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
