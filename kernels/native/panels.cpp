// Bit planes (gq_triton/kernels/packing.py) to panels (gq_triton/kernels/panels.py) and back.

#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"
#include "gq_native.h"
#include "isa.h"

namespace gq {
namespace {

// A part of each code: `width` bits of it, from bit `shift` on.
struct Field {
    int width, shift;
    int64_t plane;  // where it begins, in bytes from the first plane

    int mask() const { return (1 << width) - 1; }
    int fields() const { return 8 / width; }  // in a byte
};

// The fields of codes of so many bits, the highest first, in bit planes of `count` codes.
std::vector<Field> fields_of(int bits, int64_t count) {
    std::vector<Field> fields;
    int64_t plane = 0;
    for (int left = bits; left;) {
        const int width = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        left -= width;
        fields.push_back({width, left, plane});
        plane += cdiv(count * width, 8);
    }
    return fields;
}

int64_t plane_bytes_of(int bits, int64_t count) {
    const Field last = fields_of(bits, count).back();
    return last.plane + cdiv(count * last.width, 8);
}

void read_row(const uint8_t* planes, const std::vector<Field>& fields, int64_t first, int64_t count, uint8_t* codes) {
    std::fill_n(codes, count, uint8_t{0});
    for (const Field& field : fields) {
        const uint8_t* plane = planes + field.plane;
        for (int64_t k = 0; k < count; ++k) {
            const int64_t i = first + k;
            const int byte = plane[i / field.fields()] >> i % field.fields() * field.width;
            codes[k] |= static_cast<uint8_t>((byte & field.mask()) << field.shift);
        }
    }
}

// The planes are zeros where nothing was written yet.
void write_row(const uint8_t* codes, const std::vector<Field>& fields, int64_t first, int64_t count, uint8_t* planes) {
    for (const Field& field : fields) {
        uint8_t* plane = planes + field.plane;
        for (int64_t k = 0; k < count; ++k) {
            const int64_t i = first + k;
            const int part = codes[k] >> field.shift & field.mask();
            plane[i / field.fields()] |= static_cast<uint8_t>(part << i % field.fields() * field.width);
        }
    }
}

// Codes of a row in its block, `lane` of 16; what is stored for each is `map`.
template <int BITS>
void write_lane(const uint8_t* codes, const std::vector<uint8_t>& map, int64_t count, int64_t lane, uint8_t* block) {
    for (int64_t k = 0; k < count; ++k) {
        uint8_t* place = block + k / TILE * BITS * 64 + 4 * lane + k % 4;
        const int code = map[codes[k]], j = static_cast<int>(k % TILE / 4);
        for (int to = 0; to < BITS;) {
            const Part part = part_of(BITS, j, to);
            const int mask = (1 << part.count) - 1;
            uint8_t& byte = place[64 * part.register_];
            byte = static_cast<uint8_t>((byte & ~(mask << part.bit)) | (code >> to & mask) << part.bit);
            to += part.count;
        }
    }
}

template <int BITS>
void read_lane(const uint8_t* block, const std::vector<int16_t>& map, int64_t count, int64_t lane, uint8_t* codes) {
    for (int64_t k = 0; k < count; ++k) {
        const uint8_t* place = block + k / TILE * BITS * 64 + 4 * lane + k % 4;
        const int j = static_cast<int>(k % TILE / 4);
        int stored = 0;
        for (int to = 0; to < BITS;) {
            const Part part = part_of(BITS, j, to);
            stored |= (place[64 * part.register_] >> part.bit & ((1 << part.count) - 1)) << to;
            to += part.count;
        }
        if (map[stored] < 0) refuse("weight.panels hold a value that weight.codebook does not have");
        codes[k] = static_cast<uint8_t>(map[stored]);
    }
}

// What panels hold for each code.
std::vector<uint8_t> stored_bytes(const Weight& weight) {
    std::vector<uint8_t> map(256);
    for (int code = 0; code < 256; ++code)
        map[code] = static_cast<uint8_t>(
            weight.stores_values() ? static_cast<const uint8_t*>(weight.codebook)[code] ^ 128 : code);
    return map;
}

// The first code of each, or -1.
std::vector<int16_t> codes_of(const std::vector<uint8_t>& stored) {
    std::vector<int16_t> map(256, -1);
    for (int code = 255; code >= 0; --code) map[stored[code]] = static_cast<int16_t>(code);
    return map;
}

// f(row, its block, its lane) for all rows.
template <class Function>
void for_rows(const Weight& weight, const Function& f) {
    for (int64_t block = 0; block < weight.blocks(); ++block)
        for (int64_t lane = 0; lane < weight.row_count(block); ++lane) f(weight.first_row(block) + lane, block, lane);
}

template <int BITS>
void to_panels(const Weight& weight, const uint8_t* planes, uint8_t* panels) {
    const std::vector<Field> fields = fields_of(weight.bits, weight.rows * weight.columns);
    const std::vector<uint8_t> map = stored_bytes(weight);
    std::vector<uint8_t> codes(weight.rows ? weight.columns : 0);  // without rows, columns take no memory
    std::memset(panels, weight.stores_values() ? 128 : 0, weight.blocks() * weight.block_bytes());
    for_rows(weight, [&](int64_t row, int64_t block, int64_t lane) {
        uint8_t* to = panels + block * weight.block_bytes();
        read_row(planes, fields, row * weight.columns, weight.columns, codes.data());
        write_lane<BITS>(codes.data(), map, weight.columns, lane, to);
    });
}

template <int BITS>
void to_planes(const Weight& weight, uint8_t* planes, int64_t plane_bytes) {
    const std::vector<Field> fields = fields_of(weight.bits, weight.rows * weight.columns);
    const std::vector<int16_t> map = codes_of(stored_bytes(weight));
    std::vector<uint8_t> codes(weight.rows ? weight.columns : 0);
    std::memset(planes, 0, plane_bytes);
    for_rows(weight, [&](int64_t row, int64_t block, int64_t lane) {
        const uint8_t* from = weight.panels + block * weight.block_bytes();
        read_lane<BITS>(from, map, weight.columns, lane, codes.data());
        write_row(codes.data(), fields, row * weight.columns, weight.columns, planes);
    });
}

constexpr decltype(&to_panels<1>) TO_PANELS[] = {nullptr,      to_panels<1>, to_panels<2>, to_panels<3>, to_panels<4>,
                                                to_panels<5>, to_panels<6>, to_panels<7>, to_panels<8>};
constexpr decltype(&to_planes<1>) TO_PLANES[] = {nullptr,      to_planes<1>, to_planes<2>, to_planes<3>, to_planes<4>,
                                                to_planes<5>, to_planes<6>, to_planes<7>, to_planes<8>};

Weight checked(const gq_weight* weight, const uint8_t* planes, int64_t plane_bytes) {
    const Weight checked = check_codes("weight", weight);
    check_array("planes", planes, plane_bytes, plane_bytes_of(checked.bits, elements(checked.rows, checked.columns)));
    return checked;
}

}  // namespace
}  // namespace gq

int64_t gq_panel_bytes(int32_t bits, int64_t rows, int64_t columns, int32_t groups) {
    int64_t bytes;
    const int32_t failed = gq::guarded([&] { bytes = gq::check_shape("", bits, rows, columns, groups); });
    return failed ? -1 : bytes;
}

int32_t gq_to_panels(const uint8_t* planes, int64_t plane_bytes, const gq_weight* weight) {
    return gq::guarded([&] {
        const gq::Weight checked = gq::checked(weight, planes, plane_bytes);
        gq::TO_PANELS[checked.bits](checked, planes, const_cast<uint8_t*>(checked.panels));
    });
}

int32_t gq_to_planes(const gq_weight* weight, uint8_t* planes, int64_t plane_bytes) {
    return gq::guarded([&] {
        const gq::Weight checked = gq::checked(weight, planes, plane_bytes);
        gq::TO_PLANES[checked.bits](checked, planes, plane_bytes);
    });
}
