/* Keeps the library from being empty while its parts land. */
extern const char softkvm_anchor[];
const char softkvm_anchor[] = "softkvm";
