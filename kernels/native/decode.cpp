// Rows of a weight as floats: gq_decode_rows.

#include <algorithm>

#include "checks.h"
#include "gq_native.h"
#include "isa.h"

namespace gq {
namespace {

constexpr int64_t TILES = 8;  // decoded at a time: 16 KB

// Where a row is.
struct Place {
    int64_t block, lane;
};

Place place_of(const Weight& weight, int64_t row) {
    const int64_t unit = row % weight.group_rows();
    return {unit / BLOCK * weight.groups + row / weight.group_rows(), unit % BLOCK};
}

// How many of the indices from `first` on name rows of the same block.
int64_t run_length(const Weight& weight, const int64_t* indices, int64_t first, int64_t count) {
    const int64_t block = place_of(weight, indices[first]).block;
    int64_t next = first + 1;
    while (next < count && place_of(weight, indices[next]).block == block) ++next;
    return next - first;
}

void decode_run(const Isa& isa, const Weight& weight, const int64_t* indices, int64_t count, float* out) {
    alignas(64) float values[TILES * TILE * BLOCK];
    const int64_t block = place_of(weight, indices[0]).block;
    for (int64_t tile = 0; tile < weight.tiles(); tile += TILES) {
        const int64_t tiles = std::min(TILES, weight.tiles() - tile), column = tile * TILE;
        const int64_t columns = std::min(tiles * TILE, weight.columns - column);
        isa.decode[weight.bits](weight, block, tile, tiles, values);
        for (int64_t i = 0; i < count; ++i) {
            const float* lane = values + place_of(weight, indices[i]).lane;
            float* row = out + i * weight.columns + column;
            for (int64_t k = 0; k < columns; ++k) row[k] = lane[k * BLOCK];
        }
    }
}

}  // namespace
}  // namespace gq

int32_t gq_decode_rows(const gq_weight* weight, const int64_t* indices, int64_t count, float* out, int64_t out_count) {
    using namespace gq;
    return guarded([&] {
        const Weight checked = check_weight("weight", weight);
        check_between("count", count, 0, INT64_MAX);
        check_array("indices", indices, count, count);
        check_array("out", out, out_count, elements(count, checked.columns));
        for (int64_t i = 0; i < count; ++i) check_between("indices", indices[i], 0, checked.rows - 1);
        for (int64_t first = 0, length = 0; first < count; first += length) {
            length = run_length(checked, indices, first, count);
            decode_run(current_isa(), checked, indices + first, length, out + first * checked.columns);
        }
    });
}
