#include "fields.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <iomanip>
#include <iterator>
#include <limits>
#include <sstream>

#include "log.h"

namespace lora_drop {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

/// One field: where it is kept (one of the two), and what is accepted.
struct FieldRule {
    char const* name;
    int32_t Fields::* whole;
    float Fields::* real;
    bool required;
    bool advertised; // to the ONNX parser, which warns of each advertised field that a node lacks
    double least;
    char const* accepted;
    double most = std::numeric_limits<int32_t>::max();
};

constexpr double kABOVE_ZERO = std::numeric_limits<float>::min();
constexpr FieldRule kRULES[] = {
    {"heads", &Fields::heads, nullptr, true, true, 1, "1 or more"},
    {"kv_heads", &Fields::kv_heads, nullptr, true, true, 1, "1 or more"},
    {"head_dim", &Fields::head_dim, nullptr, true, true, 1, "1 or more"},
    {"rotary_dim", &Fields::rotary_dim, nullptr, true, true, 0, "0 (no RoPE) or more"},
    {"interleaved", &Fields::interleaved, nullptr, true, true, 0, "0 or 1", 1},
    {"window", &Fields::window, nullptr, true, true, 0, "0 (none) or more"},
    {"has_count", &Fields::has_count, nullptr, true, true, 0, "0 or 1", 1},
    {"has_norm", &Fields::has_norm, nullptr, true, true, 0, "0 or 1", 1},
    {"has_kv_scale", &Fields::has_kv_scale, nullptr, true, true, 0, "0 or 1", 1},
    {"has_sinks", &Fields::has_sinks, nullptr, false, true, 0, "0 or 1", 1},
    {"scale", nullptr, &Fields::scale, true, true, kABOVE_ZERO, "a finite number above 0"},
    {"softcap", nullptr, &Fields::softcap, true, true, 0, "0 (none) or a finite number above"},
    {"norm_epsilon", nullptr, &Fields::norm_epsilon, true, true, 0, "0 or a finite number above"},
    {"alias", &Fields::alias, nullptr, false, true, 0, "0 or 1", 1},
    {"multiprocessors", &Fields::multiprocessors, nullptr, false, false, 1, "1 or more"},
};
constexpr size_t kNB_RULES = std::size(kRULES);

std::string ruleNames() {
    std::string names;
    for (FieldRule const& rule : kRULES)
        names += (names.empty() ? "" : ", ") + std::string{rule.name};
    return names;
}

PluginFieldType typeOf(FieldRule const& rule) {
    return rule.whole != nullptr ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32;
}

void readField(PluginField const& field, FieldRule const& rule, Fields& fields) {
    if (field.type != typeOf(rule) || field.length != 1 || field.data == nullptr)
        refuse("field ", rule.name, " has ", field.length, " values of PluginFieldType ",
               static_cast<int32_t>(field.type), field.data == nullptr ? " (no data)" : "", "; expected one ",
               rule.whole != nullptr ? "int32" : "float32");
    double value{};
    if (rule.whole != nullptr) {
        std::memcpy(&(fields.*rule.whole), field.data, sizeof(int32_t));
        value = fields.*rule.whole;
    } else {
        std::memcpy(&(fields.*rule.real), field.data, sizeof(float));
        value = fields.*rule.real;
    }
    double const most = rule.whole != nullptr ? rule.most : std::numeric_limits<float>::max();
    if (!(value >= rule.least && value <= most)) // also refuses NaN
        refuse("field ", rule.name, " = ", std::setprecision(std::numeric_limits<double>::digits10), value,
               "; accepted: ", rule.accepted);
}

} // namespace

Fields parseFields(PluginFieldCollection const* collection) {
    Fields fields;
    std::array<bool, kNB_RULES> seen{};
    int32_t const count = collection == nullptr ? 0 : collection->nbFields;
    for (int32_t i = 0; i < count; ++i) {
        PluginField const& field = collection->fields[i];
        char const* const name = field.name == nullptr ? "" : field.name;
        auto const* const rule = std::find_if(std::begin(kRULES), std::end(kRULES),
                                              [&](FieldRule const& r) { return std::strcmp(r.name, name) == 0; });
        if (rule == std::end(kRULES))
            refuse("unknown field `", name, "`; accepted: ", ruleNames());
        bool& seen_before = seen[static_cast<size_t>(rule - kRULES)];
        if (seen_before)
            refuse("field ", name, " is given twice");
        seen_before = true;
        readField(field, *rule, fields);
    }
    std::string missing;
    for (size_t i = 0; i < kNB_RULES; ++i)
        if (kRULES[i].required && !seen[i])
            missing += (missing.empty() ? "" : ", ") + std::string{kRULES[i].name};
    if (!missing.empty())
        refuse("missing fields: ", missing, "; all are required but has_sinks and alias: ", ruleNames());
    if (fields.heads % fields.kv_heads != 0)
        refuse("field heads = ", fields.heads, "; accepted: a multiple of kv_heads = ", fields.kv_heads);
    if (fields.rotary_dim % 2 != 0 || fields.rotary_dim > fields.head_dim)
        refuse("field rotary_dim = ", fields.rotary_dim, "; accepted: even, at most head_dim = ", fields.head_dim);
    return fields;
}

std::string describe(Fields const& fields) {
    std::ostringstream text;
    text.precision(std::numeric_limits<float>::max_digits10);
    for (FieldRule const& rule : kRULES) {
        text << (&rule == kRULES ? "" : " ") << rule.name << '=';
        if (rule.whole != nullptr)
            text << fields.*rule.whole;
        else
            text << fields.*rule.real;
    }
    return text.str();
}

std::vector<PluginField> serializedFields(Fields const& fields) {
    std::vector<PluginField> serialized;
    for (FieldRule const& rule : kRULES) {
        void const* const data = rule.whole != nullptr ? static_cast<void const*>(&(fields.*rule.whole))
                                                       : static_cast<void const*>(&(fields.*rule.real));
        serialized.emplace_back(rule.name, data, typeOf(rule), 1);
    }
    return serialized;
}

std::vector<PluginField> advertisedFields() {
    std::vector<PluginField> advertised;
    for (FieldRule const& rule : kRULES)
        if (rule.advertised)
            advertised.emplace_back(rule.name, nullptr, typeOf(rule), 1);
    return advertised;
}

} // namespace lora_drop
