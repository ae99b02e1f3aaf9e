#include "layout.h"

namespace experts {

bool known_format(int64_t format) { return (format >= 0 && format < PLAIN) || (format >= PACKED && format < FORMATS); }

Matrix make_matrix(const void* data, int64_t format, int64_t rows, int64_t columns) {
    Matrix made = {};
    made.data = static_cast<const char*>(data);
    made.format = format;
    made.rows = rows;
    made.columns = columns;
    if (!made.packed()) {
        made.depth = columns;
        made.pitch = columns * (format == F32 ? 4 : 2);
        made.bytes = rows * made.pitch;
        return made;
    }
    int64_t parts = format - PACKED;
    made.kind = static_cast<Kind>(parts % KINDS);
    made.wide = (parts /= KINDS) % 2;
    made.a8 = (parts /= 2) % 2;
    made.group = int64_t{32} << parts / 2;
    const int64_t panels = (rows + PANEL - 1) / PANEL;
    made.depth = padded(columns, PADDED);
    made.groups = (columns + made.group - 1) / made.group;
    made.pitch = made.depth * (made.kind == INT8 ? PANEL : PANEL / 2);
    made.scale_pitch = made.groups * PANEL * (made.wide ? 4 : 2);
    made.zero_pitch = made.groups * PANEL;
    made.scales_at = padded(panels * made.pitch, LINE);
    made.zeros_at = made.scales_at + padded(panels * made.scale_pitch, LINE);
    made.bytes = made.zeros_at + (made.kind == INT4Z ? padded(panels * made.zero_pitch, LINE) : 0);
    return made;
}

}  // namespace experts
