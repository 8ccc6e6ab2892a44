"""placeholder until h3 merges"""

from stages.base import Dropped, RecordStage, hold


def verdict(record, rules):
    if rules.max_faces and len(record.faces) > rules.max_faces:
        return "too_many_faces", f"{len(record.faces)}, expected at most {rules.max_faces}"
    if record.main_face.side < rules.min_face:
        return "face_too_small", f"{record.main_face.side:.0f} pixels, expected at least {rules.min_face}"
    return None


class JudgeStage(RecordStage):
    name = "judge"
    version = 1
    requires = ("image", "parsing", "identity", "faces", "face", "measures", "source_width", "source_height")

    def process_one(self, record):
        found = verdict(record, self.config)
        return hold(record, Dropped(*found), self.name) if found else record
