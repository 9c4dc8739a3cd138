#include "log.h"

#include <iostream>
#include <mutex>

namespace lora_drop {
namespace {

using nvinfer1::ILogger;

std::mutex g_finder_mutex;
nvinfer1::ILoggerFinder* g_finder{nullptr};

} // namespace

void setFinder(nvinfer1::ILoggerFinder* finder) {
    std::lock_guard<std::mutex> const lock{g_finder_mutex};
    g_finder = finder;
}

void log(ILogger::Severity severity, std::string const& message, char const* plugin) noexcept {
    try {
        std::string const line = std::string{plugin} + ": " + message;
        ILogger* logger{nullptr};
        {
            std::lock_guard<std::mutex> const lock{g_finder_mutex};
            logger = g_finder == nullptr ? nullptr : g_finder->findLogger();
        }
        if (logger != nullptr)
            logger->log(severity, line.c_str());
        else if (severity <= ILogger::Severity::kWARNING)
            std::cerr << line << std::endl;
    } catch (...) { // a message that cannot be written must not end the process
    }
}

} // namespace lora_drop
