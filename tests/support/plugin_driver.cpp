/* Calls a plugin library as TensorRT would, without TensorRT: loads it, takes its creator, and does what the lines of
 * standard input say. Prints one JSON object per command, with the messages that the plugin logged meanwhile.
 *
 *     lora_drop_plugin_driver LIBRARY host|cuda PLUGIN    cuda: tensors lie in managed memory; PLUGIN: its name
 *
 *     field NAME int32|float32|float64 VALUE…          a field for the next `create`
 *     input TYPE[/FORMAT] DIMS MAX_DIMS FILE           the next input; FILE holds its contents, `-`: no memory
 *     output TYPE[/FORMAT] DIMS MAX_DIMS FILE          the next output; `enqueue` writes it to FILE
 *     output TYPE[/FORMAT] DIMS MAX_DIMS =INPUT:FILE   … in the memory of that input
 *     create build|runtime                             {"ok": …}
 *     deserialize | clone | attach                     replaces the plugin as TensorRT would; {"ok": …}
 *     fields | names | aliases | types | shapes | formats | configure | workspace | shape_change | enqueue
 */
#include <NvInfer.h>
#include <NvInferPlugin.h>

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

// ---- JSON out -------------------------------------------------------------------------------------------------------

std::string quoted(std::string const& text) {
    std::string out = "\"";
    for (char const c : text) {
        if (c == '"' || c == '\\')
            out += '\\';
        out += c == '\n' ? ' ' : c;
    }
    return out + '"';
}

template <typename List, typename Text>
std::string array(List const& list, Text text) {
    std::string out = "[";
    for (auto const& item : list)
        out += (out.size() > 1 ? ", " : "") + text(item);
    return out + "]";
}

std::string number(int64_t value) { return std::to_string(value); }

// ---- what TensorRT brings -------------------------------------------------------------------------------------------

class Logger final : public ILogger {
  public:
    void log(Severity severity, char const* message) noexcept override {
        lines.push_back(std::to_string(static_cast<int32_t>(severity)) + " " + message);
    }
    std::vector<std::string> lines;
};

class Finder final : public ILoggerFinder {
  public:
    ILogger* findLogger() override { return &logger; }
    Logger logger;
};

class Size final : public IDimensionExpr {
  public:
    Size(int32_t input_, int32_t axis_) : input{input_}, axis{axis_} { mImpl = nullptr; }
    int32_t input;
    int32_t axis;
};

class Builder final : public IExprBuilder {
  public:
    Builder() { mImpl = nullptr; }
};

// ---- tensors --------------------------------------------------------------------------------------------------------

bool g_managed = false;

void* allocate(size_t bytes) {
    void* memory{nullptr};
    size_t const rounded = (bytes + 255) / 256 * 256;
    if (!g_managed)
        memory = std::aligned_alloc(256, rounded);
    else if (cudaMallocManaged(&memory, rounded) != cudaSuccess)
        memory = nullptr;
    if (memory == nullptr)
        throw std::runtime_error{"out of memory"};
    return memory;
}

std::map<std::string, std::pair<DataType, size_t>> const kTYPES = {
    {"float32", {DataType::kFLOAT, 4}}, {"float16", {DataType::kHALF, 2}}, {"bfloat16", {DataType::kBF16, 2}},
    {"fp8", {DataType::kFP8, 1}},       {"int8", {DataType::kINT8, 1}},    {"int32", {DataType::kINT32, 4}},
    {"int64", {DataType::kINT64, 8}},
};

Dims dimsOf(std::string const& text) {
    Dims dims{};
    std::istringstream in{text};
    for (std::string size; std::getline(in, size, ',');)
        dims.d[dims.nbDims++] = std::stoll(size);
    return dims;
}

struct Tensors {
    std::vector<DynamicPluginTensorDesc> descs;
    std::vector<void*> memory;
    std::vector<size_t> bytes;
    std::vector<std::string> files;

    void add(std::istringstream& words, Tensors const* aliased) {
        std::string type, dims, max, file;
        words >> type >> dims >> max >> file;
        DynamicPluginTensorDesc desc{};
        size_t const slash = type.find('/');
        desc.desc.format = slash == std::string::npos ? TensorFormat::kLINEAR
                                                      : static_cast<TensorFormat>(std::stoi(type.substr(slash + 1)));
        auto const [data_type, item_bytes] = kTYPES.at(type.substr(0, slash));
        desc.desc.type = data_type;
        desc.desc.dims = dimsOf(dims);
        desc.min = desc.opt = desc.max = dimsOf(max);
        descs.push_back(desc);
        size_t size = item_bytes;
        for (int32_t i = 0; i < desc.desc.dims.nbDims; ++i)
            size *= static_cast<size_t>(std::max<int64_t>(desc.desc.dims.d[i], 1));
        bytes.push_back(size);
        void* place{nullptr};
        if (file[0] == '=') {
            place = aliased->memory.at(std::stoul(file.substr(1)));
            file = file.substr(file.find(':') + 1);
        } else if (file != "-") {
            place = allocate(size);
            std::memset(place, 0x7f, size); // an output that is not written is seen
            if (aliased == nullptr && !std::ifstream{file, std::ios::binary}.read(static_cast<char*>(place), size))
                throw std::runtime_error{file + " has not " + std::to_string(size) + " bytes"};
        }
        memory.push_back(place);
        files.push_back(file);
    }

    std::vector<PluginTensorDesc> plain() const {
        std::vector<PluginTensorDesc> out;
        for (DynamicPluginTensorDesc const& desc : descs)
            out.push_back(desc.desc);
        return out;
    }
    int32_t count() const { return static_cast<int32_t>(descs.size()); }
};

// ---- commands -------------------------------------------------------------------------------------------------------

struct Session {
    Finder finder;
    IPluginCreatorV3One* creator{nullptr};
    std::unique_ptr<IPluginV3> plugin;
    std::deque<std::string> names; // keep their addresses
    std::deque<std::vector<char>> values;
    std::vector<PluginField> fields;
    Tensors in;
    Tensors out;
    size_t workspace_bytes{0};

    template <typename Capability>
    Capability& capability(PluginCapabilityType type) {
        if (plugin == nullptr)
            throw std::runtime_error{"no plugin"};
        return *static_cast<Capability*>(plugin->getCapabilityInterface(type));
    }
    IPluginV3OneBuildV2& build() { return capability<IPluginV3OneBuildV2>(PluginCapabilityType::kBUILD); }
    IPluginV3OneRuntime& runtime() { return capability<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME); }

    void addField(std::istringstream& words) {
        std::string type, value;
        words >> names.emplace_back() >> type;
        std::vector<char>& bytes = values.emplace_back();
        auto const append = [&](auto item) {
            char const* const data = reinterpret_cast<char const*>(&item);
            bytes.insert(bytes.end(), data, data + sizeof(item));
        };
        int32_t length{0};
        for (; words >> value; ++length) {
            if (type == "int32")
                append(static_cast<int32_t>(std::stol(value)));
            else if (type == "float32")
                append(std::stof(value));
            else
                append(std::stod(value));
        }
        PluginFieldType const field_type = type == "int32" ? PluginFieldType::kINT32
            : type == "float32"                            ? PluginFieldType::kFLOAT32
                                                           : PluginFieldType::kFLOAT64;
        fields.emplace_back(names.back().c_str(), bytes.data(), field_type, length);
    }

    std::string replace(IPluginV3* with) {
        plugin.reset(with);
        return std::string{"\"ok\": "} + (plugin != nullptr ? "true" : "false");
    }

    std::string serializedFields() {
        PluginFieldCollection const& all = *runtime().getFieldsToSerialize();
        std::vector<PluginField> const list(all.fields, all.fields + all.nbFields);
        return "\"fields\": " + array(list, [](PluginField const& field) {
                   std::ostringstream text;
                   text.precision(9);
                   text << '[' << quoted(field.name) << ", ";
                   if (field.type == PluginFieldType::kINT32)
                       text << *static_cast<int32_t const*>(field.data);
                   else
                       text << *static_cast<float const*>(field.data);
                   text << ", " << static_cast<int32_t>(field.type) << ", " << field.length << ']';
                   return text.str();
               });
    }

    std::string outputShapes() {
        std::deque<Size> sizes;
        std::vector<DimsExprs> inputs;
        for (int32_t i = 0; i < in.count(); ++i) {
            DimsExprs& dims = inputs.emplace_back();
            dims.nbDims = in.descs[i].desc.dims.nbDims;
            for (int32_t axis = 0; axis < dims.nbDims; ++axis)
                dims.d[axis] = &sizes.emplace_back(i, axis);
        }
        std::vector<DimsExprs> outputs(static_cast<size_t>(build().getNbOutputs()));
        Builder builder;
        int32_t const status
            = build().getOutputShapes(inputs.data(), in.count(), nullptr, 0, outputs.data(), build().getNbOutputs(),
                                      builder);
        std::string text = "\"status\": " + number(status);
        if (status == 0)
            text += ", \"shapes\": " + array(outputs, [](DimsExprs const& dims) {
                std::vector<IDimensionExpr const*> const list(dims.d, dims.d + dims.nbDims);
                return array(list, [](IDimensionExpr const* expr) {
                    auto const& size = static_cast<Size const&>(*expr);
                    return "[" + number(size.input) + ", " + number(size.axis) + "]";
                });
            });
        return text;
    }

    std::string enqueue() {
        constexpr size_t kGUARD = 4096;
        char* const workspace = workspace_bytes == 0 ? nullptr : static_cast<char*>(allocate(workspace_bytes + kGUARD));
        if (workspace != nullptr)
            std::memset(workspace, 0xff, workspace_bytes + kGUARD);
        int32_t const status = runtime().enqueue(in.plain().data(), out.plain().data(), in.memory.data(),
                                                 out.memory.data(), workspace, nullptr);
        if (g_managed && cudaDeviceSynchronize() != cudaSuccess)
            throw std::runtime_error{"the kernel failed"};
        for (size_t i = 0; workspace != nullptr && i < kGUARD; ++i)
            if (workspace[workspace_bytes + i] != static_cast<char>(0xff))
                throw std::runtime_error{"the kernel wrote past its workspace"};
        for (int32_t i = 0; i < out.count(); ++i)
            if (out.memory[i] != nullptr)
                std::ofstream{out.files[i], std::ios::binary}.write(static_cast<char const*>(out.memory[i]),
                                                                    static_cast<std::streamsize>(out.bytes[i]));
        return "\"status\": " + number(status);
    }

    std::string run(std::string const& command, std::istringstream& words) {
        if (command == "create") {
            std::string phase;
            words >> phase;
            PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
            return replace(creator->createPlugin(
                "node", &collection, phase == "runtime" ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD));
        }
        if (command == "deserialize")
            return replace(creator->createPlugin("node", runtime().getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
        if (command == "clone")
            return replace(plugin->clone());
        if (command == "attach")
            return replace(runtime().attachToContext(nullptr));
        if (command == "fields")
            return serializedFields();
        if (command == "names") {
            auto& core = capability<IPluginV3OneCore>(PluginCapabilityType::kCORE);
            return "\"plugin\": "
                + array(std::vector<std::string>{core.getPluginName(), core.getPluginVersion(),
                                                 core.getPluginNamespace()}, quoted)
                + ", \"timing_cache_id\": " + quoted(build().getTimingCacheID())
                + ", \"outputs\": " + number(build().getNbOutputs());
        }
        if (command == "aliases")
            return "\"aliases\": " + array(std::vector<int32_t>{0, 1, 2}, [&](int32_t i) {
                       return number(build().getAliasedInput(i));
                   });
        if (command == "types") {
            std::vector<DataType> inputs, outputs(static_cast<size_t>(build().getNbOutputs()));
            for (DynamicPluginTensorDesc const& desc : in.descs)
                inputs.push_back(desc.desc.type);
            int32_t const status = build().getOutputDataTypes(outputs.data(), build().getNbOutputs(),
                                                                inputs.data(), in.count());
            return "\"status\": " + number(status)
                + ", \"types\": " + array(outputs, [](DataType type) { return number(static_cast<int32_t>(type)); });
        }
        if (command == "shapes")
            return outputShapes();
        if (command == "formats") {
            std::vector<DynamicPluginTensorDesc> all = in.descs;
            all.insert(all.end(), out.descs.begin(), out.descs.end());
            std::vector<int32_t> fits;
            for (int32_t pos = 0; pos < static_cast<int32_t>(all.size()); ++pos)
                fits.push_back(build().supportsFormatCombination(pos, all.data(), in.count(), out.count()));
            return "\"formats\": " + array(fits, number);
        }
        if (command == "configure")
            return "\"status\": "
                + number(build().configurePlugin(in.descs.data(), in.count(), out.descs.data(), out.count()));
        if (command == "workspace") {
            workspace_bytes = build().getWorkspaceSize(in.descs.data(), in.count(), out.descs.data(), out.count());
            return "\"bytes\": " + std::to_string(workspace_bytes);
        }
        if (command == "shape_change")
            return "\"status\": "
                + number(runtime().onShapeChange(in.plain().data(), in.count(), out.plain().data(), out.count()));
        if (command == "enqueue")
            return enqueue();
        throw std::runtime_error{"unknown command " + command};
    }
};

template <typename Function>
Function* symbol(void* library, char const* name) {
    void* const address = dlsym(library, name);
    if (address == nullptr)
        throw std::runtime_error{dlerror()};
    return reinterpret_cast<Function*>(address);
}

int drive(char const* path, char const* plugin) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
        throw std::runtime_error{dlerror()};
    Session session;
    symbol<void(ILoggerFinder*)>(library, "setLoggerFinder")(&session.finder);
    int32_t count{0};
    auto* const* const creators = symbol<IPluginCreatorInterface* const*(int32_t&)>(library, "getCreators")(count);
    for (int32_t i = 0; i < count; ++i) {
        if (std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0)
            throw std::runtime_error{"expected V3 creators"};
        auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (std::strcmp(creator->getPluginName(), plugin) == 0)
            session.creator = creator;
    }
    if (session.creator == nullptr)
        throw std::runtime_error{std::string{"no creator of "} + plugin};
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words{line};
        std::string command;
        words >> command;
        if (command == "field") {
            session.addField(words);
        } else if (command == "input") {
            session.in.add(words, nullptr);
        } else if (command == "output") {
            session.out.add(words, &session.in);
        } else if (!command.empty()) {
            std::string const result = session.run(command, words);
            std::cout << "{\"command\": " << quoted(command) << ", " << result
                      << ", \"log\": " << array(session.finder.logger.lines, quoted) << "}" << std::endl;
            session.finder.logger.lines.clear();
        }
    }
    return 0;
}

} // namespace

int main(int argc, char** argv) {
    try {
        if (argc != 4)
            throw std::runtime_error{"usage: lora_drop_plugin_driver LIBRARY host|cuda PLUGIN"};
        g_managed = std::strcmp(argv[2], "cuda") == 0;
        int devices{0};
        if (g_managed && (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)) {
            std::cerr << "no CUDA device" << std::endl;
            return 3;
        }
        return drive(argv[1], argv[3]);
    } catch (std::exception const& error) {
        std::cerr << "plugin_driver: " << error.what() << std::endl;
        return 1;
    }
}
