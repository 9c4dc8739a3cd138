/* Messages and refusals. A refusal is an exception inside the plugin and a logged message towards TensorRT.
 *
 * Enter: the parts of a message; the logger finder that TensorRT hands over. Leave: lines in TensorRT's log; where
 * there is none, warnings and errors on stderr. Nothing here knows fields, tensors or the kernel.
 */
#ifndef LORA_DROP_PLUGIN_LOG_H
#define LORA_DROP_PLUGIN_LOG_H

#include <NvInferRuntime.h>

#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>

#include "names.h"

namespace lora_drop {

/// The finder of the registry that loaded this library.
void setFinder(nvinfer1::ILoggerFinder* finder);

void log(nvinfer1::ILogger::Severity severity, std::string const& message,
         char const* plugin = kPLUGIN_NAME) noexcept;

template <typename... Parts>
[[noreturn]] void refuse(Parts const&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::invalid_argument{text.str()};
}

/// Runs `body`; an exception is logged and becomes `failed`, since none may reach TensorRT.
template <typename Result, typename Body>
Result guarded(char const* where, Result failed, Body&& body, char const* plugin = kPLUGIN_NAME) noexcept {
    try {
        return body();
    } catch (std::exception const& error) {
        log(nvinfer1::ILogger::Severity::kERROR, std::string{where} + ": " + error.what(), plugin);
    } catch (...) {
        log(nvinfer1::ILogger::Severity::kERROR, std::string{where} + ": unknown exception", plugin);
    }
    return failed;
}

} // namespace lora_drop
#endif
