"""HTTP: the served version, probes and metrics."""

from dataclasses import asdict

from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from twotower.serve.answers import json_response, problem
from twotower.serve.monitors import monitors
from twotower.serve.parts import ServerParts


def add_operations(app: FastAPI, parts: ServerParts) -> None:
    """Add `GET /v1/version`, `/healthz`, `/readyz` and `/metrics`."""
    snapshots, health = parts.snapshots, parts.health

    @app.get("/v1/version")
    def get_version() -> Response:
        """The served version, and one that was refused, if any."""
        version = snapshots.version
        return json_response(
            {
                "version": version.id,
                "delta_seq": version.delta_seq,
                "created_ms": version.manifest["created_ms"],
                "watermark_ms": snapshots.watermark_ms,
                "channels": list(version.channels),
                "refused": asdict(snapshots.refused) if snapshots.refused else None,
                "gated": [asdict(refusal) for refusal in snapshots.gated],
                "monitors": asdict(monitors(snapshots, parts.clock_ms())),
                "refused_delta": asdict(snapshots.refused_delta) if snapshots.refused_delta else None,
            }
        )

    # Probes run on the event loop itself and wait for nothing: all threads may be busy with searches.
    @app.get("/healthz")
    async def healthz() -> Response:
        """The process answers."""
        return json_response({"ok": True})

    @app.get("/readyz")
    async def readyz() -> Response:
        """A version is served, some channel can be searched, and every background thread does its work.

        A server whose feature store was lost is ready again when it has read the log again.

        Channels whose vector database does not answer are named. They do not make a server unready: they would take
        out all servers at once, and the other channels answer.
        """
        problems, away = health.problems(), parts.databases.problems
        if parts.users.behind:
            problems["store"] = "the feature store was lost: what it held is being read from the log again"
        if problems or parts.databases.nothing_left:
            return problem(503, ". ".join([*problems.values(), *dict.fromkeys(away.values())]))
        return json_response({"ok": True, "version": snapshots.version.id, "unavailable_channels": dict(away)})

    @app.get("/metrics")
    async def get_metrics() -> Response:
        """Counters and gauges for Prometheus."""
        return Response(
            parts.metrics.page(snapshots, health, parts.databases, parts.clock_ms()), media_type=CONTENT_TYPE_LATEST
        )
