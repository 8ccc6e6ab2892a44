"""Claims: compares what captions say of glasses, hat, hair, mouth, ears and pose with the label map
and the measures. No model runs.

A caption's claim counts as contradicted only if the measurement leaves no doubt. The limit
`claims.min_agreement` quarantines samples whose captions are contradicted too often.
"""

from __future__ import annotations

from collections.abc import Mapping

from configs.captions import AttributesConfig
from configs.quality import ClaimsConfig
from stages.annotations import Claims, Measures
from stages.backends.attributes import Attributes, appearance_of
from stages.base import Dropped, RecordStage, quarantine
from stages.claims.evidence import contradicts, evidence_of
from stages.claims.grammar import claims_of
from stages.codec import decode_labels
from stages.record import Record


class ClaimsStage(RecordStage):
    name = "claims"
    version = 1
    requires = ("image", "parsing", "faces", "face", "caption", "face_caption", Measures.name)
    provides = (Claims.name,)
    annotation = Claims
    config: ClaimsConfig

    def digests(self) -> Mapping[str, str]:
        """Returns what the measured appearance depends on, as captions of `attributes` do."""
        return Attributes.digests(AttributesConfig())

    def process_one(self, record: Record) -> Record:
        measures = record.annotation(Measures)
        if measures is None or not record.faces:
            return record
        claims = [*claims_of(record.caption), *claims_of(record.face_caption)]
        evidence = evidence_of(
            appearance_of(record), decode_labels(record.parsing), record.main_face, measures
        )
        false = [claim for claim in claims if contradicts(claim, evidence)]
        listed = "; ".join(f"{c.topic}={c.value}: {c.text}" for c in false)
        record = record.annotated(
            Claims(checked_claims=len(claims), contradictions=len(false), contradicted=listed)
        )
        agreement = 1 - len(false) / len(claims) if claims else 1.0
        if agreement < self.config.min_agreement:
            limit = self.config.min_agreement
            detail = f"{agreement:.2f} of the claims agree, expected at least {limit:g}: {listed}"
            return quarantine(record, Dropped("contradicted_caption", detail[:300]), self.name)
        return record
