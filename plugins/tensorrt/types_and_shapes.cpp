#include "types_and_shapes.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <limits>
#include <sstream>
#include <string>

#include "log.h"

namespace lora_drop {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

constexpr int64_t kLARGEST = std::numeric_limits<int32_t>::max();
constexpr int64_t kUNKNOWN_SIZE = -1; // what TensorRT calls a size that is not fixed yet

// Sizes in an Expected that the call decides; other sizes are themselves.
constexpr int64_t kB = -2;
constexpr int64_t kS = -3;
constexpr int64_t kC = -4;
constexpr int64_t kSYMBOLS[] = {kB, kS, kC};
constexpr char kSYMBOL_NAMES[] = {'B', 'S', 'C'};

/// What the call decides, as far as it is known: B, S and C.
using Decided = std::array<int64_t, std::size(kSYMBOLS)>;

struct Expected {
    char const* name;
    int32_t rank;
    std::array<int64_t, 4> sizes;
};

Expected expectedOf(Tensor tensor, Fields const& f) {
    int64_t const query = int64_t{f.heads} * f.head_dim;
    int64_t const key = int64_t{f.kv_heads} * f.head_dim;
    switch (tensor) {
    case kIN_QUERY: return {"query", 3, {kB, kS, query}};
    case kIN_KEY: return {"key", 3, {kB, kS, key}};
    case kIN_VALUE: return {"value", 3, {kB, kS, key}};
    case kIN_PAST_KEY: return {"past_key", 4, {kB, f.kv_heads, kC, f.head_dim}};
    case kIN_PAST_VALUE: return {"past_value", 4, {kB, f.kv_heads, kC, f.head_dim}};
    case kIN_LENGTH: return {"length", 1, {kB}};
    case kIN_COUNT: return {"count", 1, {kB}};
    case kIN_COS: return {"cos", 3, {kB, kS, f.rotary_dim / 2}};
    case kIN_SIN: return {"sin", 3, {kB, kS, f.rotary_dim / 2}};
    case kIN_Q_NORM: return {"q_norm", 1, {f.head_dim}};
    case kIN_K_NORM: return {"k_norm", 1, {f.head_dim}};
    case kIN_K_SCALE: return {"k_scale", 1, {f.kv_heads}};
    case kIN_V_SCALE: return {"v_scale", 1, {f.kv_heads}};
    case kIN_SINKS: return {"sinks", 1, {f.heads}};
    case kNB_INPUTS + kOUT_ATTENTION: return {"attention", 3, {kB, kS, query}};
    case kNB_INPUTS + kOUT_PRESENT_KEY: return {"present_key", 4, {kB, f.kv_heads, kC, f.head_dim}};
    case kNB_INPUTS + kOUT_PRESENT_VALUE: return {"present_value", 4, {kB, f.kv_heads, kC, f.head_dim}};
    default: refuse("no tensor ", tensor);
    }
}

template <typename List>
std::string shapeText(List const& sizes, int32_t rank) {
    std::ostringstream text;
    text << '[';
    for (int32_t i = 0; i < rank; ++i) {
        text << (i == 0 ? "" : ", ");
        auto const* const symbol = std::find(std::begin(kSYMBOLS), std::end(kSYMBOLS), sizes[i]);
        if (symbol != std::end(kSYMBOLS))
            text << kSYMBOL_NAMES[symbol - kSYMBOLS];
        else
            text << sizes[i];
    }
    text << ']';
    return text.str();
}

std::string shapeText(Dims const& dims) { return shapeText(dims.d, dims.nbDims); }

/// Whether a shape is the expected one; what it decides goes into `decided`.
bool shapeFits(Dims const& dims, Expected const& expected, Decided& decided, bool may_be_dynamic) {
    bool fits = dims.nbDims == expected.rank;
    for (int32_t axis = 0; fits && axis < expected.rank; ++axis) {
        int64_t const size = dims.d[axis];
        if (size == kUNKNOWN_SIZE && may_be_dynamic)
            continue;
        auto const* const symbol = std::find(std::begin(kSYMBOLS), std::end(kSYMBOLS), expected.sizes[axis]);
        if (symbol == std::end(kSYMBOLS)) {
            fits = size == expected.sizes[axis];
            continue;
        }
        int64_t& known = decided[static_cast<size_t>(symbol - kSYMBOLS)];
        fits = size >= 0 && size <= kLARGEST && (known == kUNKNOWN_SIZE || size == known);
        known = size;
    }
    return fits;
}

int32_t positive(char const* what, int64_t size) {
    if (size < 1 || size > kLARGEST)
        refuse("the profile's largest ", what, " is ", size, "; accepted: 1 to 2^31 - 1");
    return static_cast<int32_t>(size);
}

} // namespace

char const* typeName(DataType type) {
    switch (type) {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kFP8: return "fp8";
    case DataType::kINT8: return "int8";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    default: return "another type";
    }
}

bool typeFits(Tensor tensor, DataType type, DataType query, DataType past_key, Fields const& fields) {
    switch (tensor) {
    case kIN_QUERY: return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
    case kIN_PAST_KEY:
        return fields.has_kv_scale != 0 ? type == DataType::kFP8 || type == DataType::kINT8 : type == query;
    case kIN_PAST_VALUE:
    case kNB_INPUTS + kOUT_PRESENT_KEY:
    case kNB_INPUTS + kOUT_PRESENT_VALUE: return type == past_key;
    case kIN_LENGTH:
    case kIN_COUNT: return type == DataType::kINT64;
    case kIN_K_SCALE:
    case kIN_V_SCALE:
    case kIN_SINKS: return type == DataType::kFLOAT;
    default: return type == query;
    }
}

Sizes checkedSizes(Descs const& descs, Fields const& fields, bool may_be_dynamic) {
    PluginTensorDesc const& query = *descs[kIN_QUERY];
    PluginTensorDesc const& past_key = *descs[kIN_PAST_KEY];
    Decided decided;
    decided.fill(kUNKNOWN_SIZE);
    for (Tensor tensor = 0; tensor < static_cast<Tensor>(descs.size()); ++tensor) {
        if (descs[tensor] == nullptr)
            continue;
        PluginTensorDesc const& desc = *descs[tensor];
        Expected const expected = expectedOf(tensor, fields);
        if (desc.format != TensorFormat::kLINEAR)
            refuse(expected.name, " has TensorFormat ", static_cast<int32_t>(desc.format), "; accepted: kLINEAR");
        if (!typeFits(tensor, desc.type, query.type, past_key.type, fields))
            refuse(expected.name, " is ", typeName(desc.type), ", where query is ", typeName(query.type),
                   ", past_key ", typeName(past_key.type), " and has_kv_scale = ", fields.has_kv_scale);
        if (!shapeFits(desc.dims, expected, decided, may_be_dynamic))
            refuse(expected.name, " is ", shapeText(desc.dims), "; expected ",
                   shapeText(expected.sizes, expected.rank), " with B and S of query ", shapeText(query.dims),
                   ", C of past_key ", shapeText(past_key.dims));
    }
    auto const [batch, new_tokens, slots] = decided;
    return {static_cast<int32_t>(batch), static_cast<int32_t>(new_tokens), static_cast<int32_t>(slots), query.type,
            past_key.type};
}

Sizes largestSizes(Sizes sizes, nvinfer1::DynamicPluginTensorDesc const& query,
                   nvinfer1::DynamicPluginTensorDesc const& past_key) {
    sizes.batch = positive("batch", query.max.d[0]);
    sizes.new_tokens = positive("number of new tokens", query.max.d[1]);
    sizes.slots = positive("number of slots", past_key.max.d[2]);
    return sizes;
}

} // namespace lora_drop
