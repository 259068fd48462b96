# libllama as upstream made it, for the tests that compare with it bit for bit: the objects of our libllama, except for
# the files that a patch changes, which are compiled again from their originals. In BUILD/unpatched, beside links to the
# ggml libraries, which no patch touches.
set(originals "")
foreach(path ${HOBBIT_PATCHED_FILES})
    if(NOT path MATCHES "^src/[^/]+\\.cpp$")
        message(FATAL_ERROR "${path} is patched: only src/*.cpp may be, or this must build all of libllama again.")
    endif()
    list(APPEND originals "${HOBBIT_UPSTREAM}/originals/${path}")
endforeach()
string(REGEX REPLACE "src/([^;]+)\\.cpp" "\\1" stems "${HOBBIT_PATCHED_FILES}")
string(REPLACE ";" "|" stems "${stems}")

set(kept "$<TARGET_OBJECTS:llama>")
if(stems)
    set(kept "$<FILTER:${kept},EXCLUDE,/(${stems})\\.cpp\\.o$>")
endif()
file(CONFIGURE OUTPUT "${CMAKE_BINARY_DIR}/empty.cpp" CONTENT "")
add_library(llama-unpatched SHARED "${CMAKE_BINARY_DIR}/empty.cpp" ${originals} ${kept})
target_link_libraries(llama-unpatched PRIVATE ggml Threads::Threads)
foreach(property COMPILE_OPTIONS COMPILE_DEFINITIONS)
    set_property(TARGET llama-unpatched PROPERTY ${property} $<TARGET_PROPERTY:llama,${property}>)
endforeach()
target_compile_definitions(llama-unpatched PRIVATE LLAMA_SHARED)
target_include_directories(llama-unpatched PRIVATE
    "${HOBBIT_UPSTREAM}/llama.cpp/src" "${HOBBIT_UPSTREAM}/llama.cpp/include" "${CMAKE_BINARY_DIR}/llama.cpp/src")
set_target_properties(llama-unpatched PROPERTIES
    OUTPUT_NAME llama LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/unpatched"
    BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
foreach(target ggml ggml-base ggml-cpu)
    add_custom_command(TARGET llama-unpatched POST_BUILD VERBATIM
        COMMAND ${CMAKE_COMMAND} -E create_symlink $<TARGET_FILE:${target}>
                $<TARGET_FILE_DIR:llama-unpatched>/$<TARGET_FILE_NAME:${target}>)
endforeach()
