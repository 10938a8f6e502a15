"""The certificate: what was asked, what went, what stayed, what it cost, and digests to check it all against."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from fedfactory_ray.errors import CardError, UnlearningError
from fedfactory_ray.generation.samplers import network_evaluations
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import AUDIT, CERTIFICATE, METHOD, MODULES
from fedfactory_ray.synthesis.shard import Shard
from fedfactory_ray.unlearning.facts import Facts, weights
from fedfactory_ray.unlearning.request import Request

OURS = ("reuse", "modules", "synthesis", f"classifier ({METHOD})", "experts", "evaluation", "logging", "deletion")


@dataclass(frozen=True)
class Certificate:
    """A fulfilled request. `inexact` says why bitwise equality is not promised (empty: it is); `absent` are the classes
    that nobody holds any more; `mlflow` what was deleted there, by kind."""

    request: Request
    inexact: list[str]
    absent: list[int]
    deleted: dict[str, list[dict[str, Any]]]
    kept: dict[str, int]
    before: Facts
    after: Facts
    cost: dict[str, Any]
    environment: list[dict[str, str]]
    mlflow: dict[str, list[str]]

    def to_json(self) -> bytes:
        """The certificate as JSON with sorted keys."""
        return json.dumps(asdict(self), indent=2, sort_keys=True).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Certificate:
        """Inverse of `to_json`. Raises UnlearningError for what is no certificate."""
        try:
            tree = json.loads(text)
            certificate = cls(**tree | {"request": Request.of(tree["request"])})
            found: Certificate = TypeAdapter(cls).validate_python(vars(certificate))
            # All that is worked out of the facts anew each time.
            _ = [
                (facts.cards, facts.shards, facts.divergences, facts.digests()) for facts in (found.before, found.after)
            ]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, CardError) as error:
            raise UnlearningError(f"no certificate ({error})"[:500], "certificate.json as it was written") from error
        return found


def what_went(before: Facts, after: Facts) -> dict[str, list[dict[str, Any]]]:
    """Modules, units and weights of the old run that the new one does not have, by digest."""
    modules, units = {c.sha256 for c in after.cards}, {(s.file, s.rows_sha256) for s in after.shards}
    files = set(weights(after).items())
    return {
        "modules": [
            {"client": c.client, "class": c.label, "sha256": c.sha256} for c in before.cards if c.sha256 not in modules
        ],
        "units": [
            {"file": s.file, "images": s.n, "rows_sha256": s.rows_sha256}
            for s in before.shards
            if (s.file, s.rows_sha256) not in units
        ],
        "weights": [
            {"file": name, "sha256": digest}
            for name, digest in weights(before).items()
            if (name, digest) not in files and not name.startswith(f"{MODULES}/")
        ],
    }


def what_stayed(before: Facts, after: Facts) -> dict[str, int]:
    """How much of the old run the new one has as it was, what determined it included."""
    cards, shards = before.cards, set(before.shards)  # read once: Facts parses them anew each time
    units = [shard for shard in after.shards if shard in shards]
    return {
        "modules": sum(card in cards for card in after.cards),
        "units": len(units),
        "images": sum(shard.n for shard in units),
        "classifiers": int(after.classifier is not None and after.classifier == before.classifier),
        "experts": sum(expert == before.experts.get(client) for client, expert in after.experts.items()),
    }


def cost(
    config: Config, before: Facts, after: Facts, seconds: dict[str, float], original: dict[str, Any] | None
) -> dict[str, Any]:
    """What forgetting cost, absolutely and as a fraction of the first run. After repeated forgetting that is the very
    first run: the `original` of the old certificate."""
    each, batch = network_evaluations(config.sampler.solver, config.sampler.evaluations), config.synthesis.batch_size

    def work(phases: dict[str, float], facts: Facts, stayed: dict[str, int], drawn: Sequence[Shard]) -> dict[str, Any]:
        fits = (facts.classifier is not None) + len(facts.experts)
        return {
            "seconds": sum(phases[phase] for phase in OURS if phase in phases),
            # A last batch is filled up.
            "network_evaluations": sum(-(-shard.n // batch) * batch * each for shard in drawn),
            "images_drawn": sum(shard.n for shard in drawn),
            "modules_trained": len(facts.modules) - stayed["modules"],
            "fits": fits - stayed["classifiers"] - stayed["experts"],
        }

    nothing = dict.fromkeys(("modules", "classifiers", "experts"), 0)
    there = set(before.shards)
    again = [shard for shard in after.shards if shard not in there]
    spent = work(seconds, after, what_stayed(before, after), again)
    whole = original or work(before.seconds, before, nothing, before.shards)
    share = {name: spent[name] / whole[name] for name in spent if whole[name]}
    return {"spent": spent, "seconds_by_phase": seconds, "original_run": whole, "share": share}


def note(storage: Storage, line: dict[str, Any]) -> None:
    """Append a line to a run's audit log, in place of an earlier one of the same request."""
    kept = [other for other in audit_lines(storage) if other["request"] != line["request"]]
    text = "".join(f"{json.dumps(each, sort_keys=True)}\n" for each in [*kept, line])
    storage.write(AUDIT, text.encode())


def audit_lines(storage: Storage) -> list[dict[str, Any]]:
    """The lines of a run's audit log: request and the certificate's SHA-256. Raises UnlearningError for others."""
    text = storage.read(AUDIT) if storage.exists(AUDIT) else b""
    try:
        lines = [json.loads(line) for line in text.splitlines()]
        for line in lines:
            Request.of(line["request"])
            if line.keys() != {"request", "certificate_sha256"} or not isinstance(line["certificate_sha256"], str):
                raise ValueError(f"a line of {', '.join(line)}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, UnlearningError) as error:
        raise UnlearningError(f"{storage.uri}/{AUDIT} is damaged ({error})", "the log as it was written") from error
    return lines


def read_certificate(storage: Storage) -> Certificate:
    """The certificate in a run's folder. Raises UnlearningError where there is none."""
    if not storage.exists(CERTIFICATE):
        raise UnlearningError(f"{storage.uri} holds no {CERTIFICATE}", "the finished successor, as it was made")
    return Certificate.from_json(storage.read(CERTIFICATE))
